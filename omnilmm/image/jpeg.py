"""JPEG files at the level of their segments (ITU-T T.81, annex B): size, and pixels without metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import cycle, islice
from typing import NamedTuple

from omnilmm.errors import ImageError

_MAX_SEGMENTS = 4096
_MAX_SCANS = 64
"""A progressive picture needs about a dozen; every scan is a pass over all of its pixels."""

_DHT, _SOI, _EOI, _SOS, _DQT, _DNL, _DRI = 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD
_APP0, _APP1, _APP14, _COM = 0xE0, 0xE1, 0xEE, 0xFE
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # TEM and the restart markers have no length
_SOF_HUFFMAN = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive
_SOF_OTHER = frozenset(
    {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xDE, 0xF7}
)  # arithmetic, lossless...
_KEPT = _SOF_HUFFMAN | {_SOS, _DQT, _DHT, _DRI, _EOI}
_AFTER_A_SCAN = frozenset({_SOS, _DQT, _DHT, _DRI, _EOI, _DNL, _COM, *range(0xE0, 0xF0)})

_MARKER = re.compile(rb"\xff([^\x00\xff])")
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")


class Segment(NamedTuple):
    """`data[start:end]` is the whole segment, marker included; `body` is where its contents begin.

    The coded data that follow an SOS header belong to its segment.
    """

    marker: int
    start: int
    body: int
    end: int


def segments(data: bytes) -> Iterator[Segment]:
    """Every segment after SOI, up to EOI.

    Bytes that belong to none are skipped, as libjpeg does, but only in front of the first scan: behind it they
    are coded data that a stray marker has cut off.

    Raises:
        ImageError: image_parse_error: a segment or the file ends too early, there are too many segments, or
            coded data hold a marker that has no place there.
    """
    position = 2
    scanning = False
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None:
            raise _broken()
        marker, start, body = found[1][0], found.start(), found.end()
        if scanning and (marker not in _AFTER_A_SCAN or data[position:start].strip(b"\xff")):
            raise _broken()
        position = body
        if marker in _STANDALONE:
            continue
        if marker == _EOI:
            yield Segment(marker, start, body, body)
            return
        end = body + int.from_bytes(data[body : body + 2], "big")
        if marker == _SOI or end < body + 2 or end > len(data):
            raise _broken()
        if marker == _SOS:
            scanning = True
            end = _end_of_scan(data, body + 2, end)
        yield Segment(marker, start, body + 2, end)
        position = end
    raise _broken()


def _end_of_scan(data: bytes, body: int, end: int) -> int:
    """Where the coded data after the SOS header `data[body:end]` stop (T.81, B.2.3)."""
    components = data[body] if body < end else 0
    after = _END_OF_SCAN.search(data, end)
    if not 1 <= components <= 4 or end - body != 4 + 2 * components or after is None:
        raise _broken()
    return after.start()


def size(data: bytes) -> tuple[int, int]:
    """Width and height from the frame header.

    Raises:
        ImageError: image_parse_error; unsupported_image_media_type for arithmetic, lossless, hierarchical and
            12-bit pictures; invalid_image_mode for a number of components that is not 1, 3 or 4.
    """
    for segment in segments(data):
        if segment.marker in _SOF_OTHER:
            raise _unsupported()
        if segment.marker == _SOS:
            break
        if segment.marker in _SOF_HUFFMAN:
            if segment.end - segment.body < 6:
                break
            bits, height, width, components = _frame(data, segment.body)
            if bits != 8:
                raise _unsupported()
            if components not in (1, 3, 4):
                raise ImageError("A JPEG picture must have 1, 3 or 4 components.", code="invalid_image_mode")
            return width, height
    raise _broken()


def bare(data: bytes) -> tuple[bytes, bytes]:
    """The file with nothing left in it but what the pixels need, and the EXIF block (b"" if there is none).

    Profiles, thumbnails, comments, further pictures and whatever follows the end are gone, so no code of a
    decoder that reads them can be reached. The JFIF and Adobe segments stay, as they tell the colour space.

    Raises:
        ImageError: image_parse_error: what `segments` refuses, restart markers that do not count round, or too
            many scans. A decoder would take many of these for the end of the data and fill the rest with grey.
    """
    view = memoryview(data)
    pieces = [view[:2]]
    exif = b""
    scans = restart_interval = 0
    for marker, start, body, end in segments(data):
        if marker == _DRI:
            restart_interval = int.from_bytes(data[body : body + 2], "big")
        elif marker == _SOS:
            scans += 1
            _check_restarts(data, body, end, restart_interval)
        elif marker == _APP1 and not exif and data.startswith(b"Exif\0\0", body):
            exif = data[body:end]
        if marker in _KEPT or _tells_colour(data, marker, body):
            pieces.append(view[start:end])
    if not 0 < scans <= _MAX_SCANS:
        raise _broken()
    return b"".join(pieces), exif


def with_surplus(data: bytes) -> bytes:
    """`data`, as `bare` made it, with more coded data before its end, some of them behind restart markers.

    A decoder does not look at them if the picture was complete; where it was not, they show in the pixels.
    """
    some = bytes((37 * index + 11) % 0xFF for index in range(64))
    surplus = b"".join(bytes([0xFF, restart]) + some for restart in range(0xD0, 0xD8))
    return data[:-2] + some + surplus + data[-2:]


def _tells_colour(data: bytes, marker: int, body: int) -> bool:
    return (marker == _APP0 and data.startswith(b"JFIF\0", body)) or (
        marker == _APP14 and data.startswith(b"Adobe", body)
    )


def _frame(data: bytes, body: int) -> tuple[int, int, int, int]:
    height = int.from_bytes(data[body + 1 : body + 3], "big")
    width = int.from_bytes(data[body + 3 : body + 5], "big")
    return data[body], height, width, data[body + 5]


def _check_restarts(data: bytes, start: int, end: int, interval: int) -> None:
    """Restart markers come only where DRI announced them, and count round from 0 to 7."""
    found = b"".join(_RESTART.findall(data, start, end))
    expected = bytes(islice(cycle(range(0xD0, 0xD8)), len(found))) if interval else b""
    if found != expected:
        raise _broken()


def _broken() -> ImageError:
    return ImageError("The JPEG file is damaged or cut short.", code="image_parse_error")


def _unsupported() -> ImageError:
    return ImageError(
        "Only 8-bit baseline and progressive JPEG pictures are supported.", code="unsupported_image_media_type"
    )
