"""Random numbers that need no state: a pure function of (seed, position).

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The seed is
the key and the position in the generated text is the counter, so a token's draw does not depend on who shares its
batch, how often the sequence was preempted, or which process generated the tokens before it.
"""

from __future__ import annotations

Words = tuple[int, int, int, int]

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: what the key grows by after each round


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four random 32-bit words for a 128-bit counter and a 64-bit key, both as 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & _WORD, (first >> 32) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to `position` (>= 0) of a text drawn with `seed` (taken modulo 2**64).

    It has the full 53 bits of a float, so that rare tokens keep their probability.
    """
    high, low, _, _ = philox4x32(
        (position & _WORD, (position >> 32) & _WORD, 0, 0), (seed & _WORD, (seed >> 32) & _WORD)
    )
    return ((high >> 5) * 2**26 + (low >> 6)) * 2.0**-53
