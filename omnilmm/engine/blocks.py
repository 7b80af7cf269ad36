"""Who holds which block of the KV pool. Integers and digests only: no tensor, no token, no request.

A block has `block_size` token positions. It is in one of three states:

    held       by one or more sequences
    cached     by nobody, but its content is known by digest and may be found again; the oldest is given away first
    free       by nobody, content unknown; given away before any cached block
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PictureMark:
    """A picture that reaches into a block: its key, and where it starts relative to the block's first position."""

    key: str
    start: int
    length: int


def root_digest(scope: str, adapter: str | None) -> bytes:
    """What the chain of a sequence begins with: tenants and adapters never share a block."""
    digest = hashlib.sha256(b"root" if adapter is None else b"root+adapter")
    for name in (scope, adapter or ""):
        _update_text(digest, name)
    return digest.digest()


def block_digest(parent: bytes, ids: Sequence[int], pictures: Sequence[PictureMark]) -> bytes:
    """SHA-256 of everything that decides a full block's keys and values: all before it, its ids, its pictures.

    Picture positions all carry the same placeholder id, so the key and the offset are what tells pictures apart.
    Every variable part is preceded by its length: two different contents never give the same bytes.
    """
    digest = hashlib.sha256(parent)
    digest.update(struct.pack(f"<I{len(ids)}q", len(ids), *ids))
    for picture in pictures:
        _update_text(digest, picture.key)
        digest.update(struct.pack("<qq", picture.start, picture.length))
    return digest.digest()


def _update_text(digest: hashlib._Hash, text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")  # no string, however odd, may stop the engine
    digest.update(struct.pack("<I", len(raw)) + raw)


class BlockManager:
    """Reference counts, the order in which blocks are given away, and the index from digest to block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_holders = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be given away first

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._idle)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` positions fill or begin."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of `digests`, from the first one, whose content is here."""
        block_ids = []
        for digest in digests:
            block_id = self._index.get(digest)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def can_take(self, num_blocks: int, *, beside: Sequence[int] = ()) -> bool:
        """Whether `num_blocks` could be taken after the blocks `beside` were shared."""
        return num_blocks + sum(block_id in self._idle for block_id in beside) <= len(self._idle)

    def take_blocks(self, num_blocks: int) -> list[int]:
        """Hand out blocks nobody holds, forgetting what they held. Only after `can_take` said yes."""
        assert self.can_take(num_blocks), "took more blocks than there are"
        block_ids = [self._idle.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in block_ids:
            self._drop_digest(block_id)
            self._num_holders[block_id] = 1
        return block_ids

    def share_blocks(self, block_ids: Iterable[int]) -> None:
        """Add one holder to each block that `find_prefix` found."""
        for block_id in block_ids:
            self._idle.pop(block_id, None)
            self._num_holders[block_id] += 1

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        """Take one holder away from each block of a sequence, given in order of position.

        Later blocks are given away before earlier ones, because nobody can use them without their prefix.
        """
        for block_id in reversed(block_ids):
            assert self._num_holders[block_id] > 0, "released a block that nobody holds"
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                self._idle[block_id] = None
                if self._digests[block_id] is None:
                    self._idle.move_to_end(block_id, last=False)

    def publish(self, block_id: int, digest: bytes) -> None:
        """From now on `find_prefix` may find this held, fully computed block. The first block of a content stays."""
        if self._digests[block_id] is None and digest not in self._index:
            self._digests[block_id] = digest
            self._index[digest] = block_id

    def forget(self, block_ids: Iterable[int]) -> None:
        """The content of these held blocks turned out to be unfit for anyone else."""
        for block_id in block_ids:
            self._drop_digest(block_id)

    def _drop_digest(self, block_id: int) -> None:
        digest = self._digests[block_id]
        if digest is not None:
            del self._index[digest]
            self._digests[block_id] = None

    def check_integrity(self, holdings: Iterable[Sequence[int]]) -> None:
        """Compare the books with what the sequences say they hold. AssertionError if they differ."""
        expected = [0] * self.num_blocks
        for block_ids in holdings:
            assert len(set(block_ids)) == len(block_ids), "a sequence holds a block twice"
            for block_id in block_ids:
                expected[block_id] += 1
        assert self._num_holders == expected, "reference counts differ from what the sequences hold"
        idle = {block_id for block_id, holders in enumerate(expected) if holders == 0}
        assert set(self._idle) == idle, "a block is idle and held, or neither"
        known = {digest: block_id for block_id, digest in enumerate(self._digests) if digest is not None}
        assert self._index == known, "the index and the blocks disagree about contents"
