"""From the bytes of a file to its key: two files share one exactly where people see the same picture.

What people see is worked out here by hand, pixel by pixel, without the product's decoding.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omnilmm.cache.key import KeyRing
from omnilmm.config import ImageLimits, ImagePolicy, InputHandling
from omnilmm.image.transform import prepare
from omnilmm.messages import PixelIdentity

RING = KeyRing(b"0123456789abcdef")
POLICY = ImagePolicy(28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# EXIF 2.32, 4.6.4: where row 0 and column 0 of the stored picture are, as numpy turns them upright.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}


@dataclass(frozen=True)
class Drawn:
    """A picture as it is stored: `mode` and `samples` of (height, width), and how it is to be turned."""

    mode: str
    size: tuple[int, int]
    samples: bytes
    palette: bytes = b""
    orientation: int = 1

    def file(self) -> bytes:
        image = Image.frombytes(self.mode, self.size, self.samples)
        if self.mode == "P":
            image.putpalette(self.palette)
        exif = Image.Exif()
        exif[0x0112] = self.orientation
        buffer = io.BytesIO()
        image.save(buffer, "PNG", exif=exif)
        return buffer.getvalue()

    def seen(self) -> np.ndarray:
        """uint8 (height, width, 3): on white where it is transparent, and upright."""
        width, height = self.size
        raw = np.frombuffer(self.samples, np.uint8).reshape(height, width, -1)
        colours = {
            "L": lambda: raw.repeat(3, axis=2),
            "LA": lambda: _on_white(raw[:, :, :1].repeat(3, axis=2), raw[:, :, 1:]),
            "RGB": lambda: raw,
            "RGBA": lambda: _on_white(raw[:, :, :3], raw[:, :, 3:]),
            "P": lambda: np.frombuffer(self.palette, np.uint8).reshape(-1, 3)[raw[:, :, 0]],
        }[self.mode]()
        return UPRIGHT[self.orientation](colours)


def _on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Alpha is 0 or 255 here, so that there is nothing to round."""
    return np.where(alpha == 255, colours, 255).astype(np.uint8)


def key_of(data: bytes, *, policy: ImagePolicy = POLICY, scope: str = "tenant") -> str:
    identity = prepare(data, policy=policy, limits=ImageLimits(), param="image").identity
    return _name(identity, policy, scope)


def _name(identity: PixelIdentity, policy: ImagePolicy, scope: str) -> str:
    return RING.embedding_key(
        identity, scope=scope, family="f", fingerprint="w", preprocessing=policy.version, dtype="bfloat16"
    )


CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 1}

# Few values, small sides: the pictures most likely to have the same bytes in another shape.
samples = st.sampled_from([0, 1, 255])


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    mode = draw(st.sampled_from(sorted(CHANNELS)))
    width, height = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    values = draw(st.lists(samples, min_size=width * height * CHANNELS[mode], max_size=width * height * CHANNELS[mode]))
    if mode in ("LA", "RGBA"):
        last = CHANNELS[mode] - 1
        values = [v if i % CHANNELS[mode] != last else 255 * (v > 0) for i, v in enumerate(values)]
    palette = b""
    if mode == "P":
        values = [value % 2 for value in values]
        palette = bytes(draw(st.lists(samples, min_size=6, max_size=6)))
    return Drawn(mode, (width, height), bytes(values), palette, draw(st.sampled_from(sorted(UPRIGHT))))


@settings(deadline=None, max_examples=150)
@given(drawn(), drawn())
def test_two_files_share_a_key_exactly_where_the_same_is_seen(one: Drawn, other: Drawn) -> None:
    same = one.seen().shape == other.seen().shape and bool((one.seen() == other.seen()).all())
    assert (key_of(one.file()) == key_of(other.file())) == same


@settings(deadline=None, max_examples=60)
@given(drawn())
def test_the_key_is_that_of_what_is_seen(picture: Drawn) -> None:
    pixels = np.ascontiguousarray(picture.seen())
    identity = PixelIdentity(hashlib.sha256(pixels.tobytes()).digest(), pixels.shape[1], pixels.shape[0])
    assert key_of(picture.file()) == _name(identity, POLICY, "tenant")


PLAIN = Drawn("RGB", (3, 2), bytes(range(0, 180, 10)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # The same bytes in another shape (CVE-2025-46722), and in another mode.
        (Drawn("L", (30, 100), bytes(3000)), Drawn("L", (100, 30), bytes(3000))),
        (Drawn("L", (6, 1), bytes([9] * 5 + [8])), Drawn("RGB", (2, 1), bytes([9] * 5 + [8]))),
        # The same indices with another palette.
        (Drawn("P", (2, 1), b"\0\1", b"\0\0\0\x09\x09\x09"), Drawn("P", (2, 1), b"\0\1", b"\0\0\0\x08\x09\x09")),
        # The same colours behind another mask.
        (Drawn("RGBA", (1, 1), b"\x09\x09\x09\xff"), Drawn("RGBA", (1, 1), b"\x09\x09\x09\0")),
        # The same pixels, to be turned another way.
        *((PLAIN, replace(PLAIN, orientation=turn)) for turn in range(2, 9)),
    ],
)
def test_pictures_known_to_have_been_mixed_up_elsewhere_are_not(one: Drawn, other: Drawn) -> None:
    assert key_of(one.file()) != key_of(other.file())


@settings(deadline=None, max_examples=30)
@given(drawn(), st.sampled_from([{"side": 14}, {"handling": InputHandling.ORIGINAL}]))
def test_another_way_of_preparing_gives_another_key(picture: Drawn, changes: dict) -> None:
    assert key_of(picture.file()) != key_of(picture.file(), policy=POLICY.resolve(**changes))


@settings(deadline=None, max_examples=30)
@given(drawn(), st.text(max_size=8), st.text(max_size=8))
def test_each_tenant_has_keys_of_its_own(picture: Drawn, one: str, other: str) -> None:
    data = picture.file()
    assert (key_of(data, scope=one) == key_of(data, scope=other)) == (one == other)
    digest = hashlib.sha256(data).digest()
    aliases = {RING.alias_key(digest, scope=scope, decoding=POLICY.version) for scope in (one, other)}
    assert len(aliases) == len({one, other})
