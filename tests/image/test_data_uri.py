"""Data URIs: rows D01 to D05 of the bad-input catalogue, and the written grammar."""

from __future__ import annotations

import base64
import tracemalloc

import pytest
from fuzzing import FUZZ
from hypothesis import given, settings
from hypothesis import strategies as st

from omnilmm.config import ImageLimits
from omnilmm.errors import ImageError, PayloadTooLarge
from omnilmm.image.data_uri import read_data_uri

PARAM = "messages[0].content[1].image_url.url"
FILE = bytes(range(256)) * 3 + b"\xff"  # its base64 has + and / and two = signs
TEXT = base64.b64encode(FILE).decode()


def read(url: str, limits: ImageLimits | None = None) -> bytes:
    return read_data_uri(url, param=PARAM, limits=limits or ImageLimits())


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "data:image/jpeg;base64,",
        "DATA:image/png;base64,",
        "Data:Image/PNG;Base64,",
        "data:image/png;charset=utf-8;base64,",
        "data:image/png;name=my%20cat.png;charset=x;base64,",
        "data:image/png;name=;base64,",
        "data:image/vnd.unheard-of+x;base64,",
        "data:image/tiff;base64,",  # what it really is, the bytes tell
    ],
)
def test_the_grammar_accepts(head: str) -> None:
    assert read(head + TEXT) == FILE


@pytest.mark.parametrize("gap", [" ", "\n", "\r\n", "\t", "\f", " \r\n\t "])
def test_white_space_changes_nothing(gap: str) -> None:
    pieces = [TEXT[i : i + 76] for i in range(0, len(TEXT), 76)]
    assert read("data:image/png;base64," + gap.join(pieces) + gap) == FILE


@pytest.mark.parametrize(
    "url",
    [
        "",
        "data:",
        "data:,",
        "data",
        "image/png;base64," + TEXT,
        " data:image/png;base64," + TEXT,
        "data:image/png;base64" + TEXT,  # no comma
        "data:image/png," + TEXT,  # no ;base64
        "data:image/png;base64;charset=x," + TEXT,  # not right before the comma
        "data:image/png;base64;base64," + TEXT,
        "data:image/png;base32," + TEXT,
        "data:image/png;;base64," + TEXT,
        "data:image/png; base64," + TEXT,
        'data:image/png;name="a";base64,' + TEXT,
        "data:image;base64," + TEXT,
        "data:image/png/x;base64," + TEXT,
        "data:image/\ud800;base64," + TEXT,
        "data:image/png;name=" + "x" * 600 + ";base64," + TEXT,
        "data:image/png;base64;" + "x" * 5000,
    ],
)
def test_what_is_no_data_uri_of_ours(url: str) -> None:
    with pytest.raises(ImageError) as refusal:
        read(url)
    # With no media type at all RFC 2397 means text/plain.
    assert refusal.value.code == ("unsupported_image_media_type" if url == "data:," else "invalid_image_url")
    assert refusal.value.param == PARAM


@pytest.mark.parametrize(
    "head",
    [
        "data:text/html;base64,",
        "data:text/html,<script>",
        "data:;base64,",
        "data:image/svg+xml;base64,",
        "data:IMAGE/SVG+XML;base64,",
        "data:video/jpeg;base64," + "," * 1000,
        "data:application/pdf;base64,",
        "data:application/octet-stream;base64,",
    ],
)
def test_media_types_that_are_no_pictures(head: str) -> None:
    with pytest.raises(ImageError) as refusal:
        read(head + TEXT)
    assert refusal.value.code == "unsupported_image_media_type"


@pytest.mark.parametrize(
    "payload",
    [
        "-_-_",
        "AAA*",
        "AAAA=AAAA",
        "AA==AAAA",
        "AAA",
        "AA",
        "A",
        "AA=",
        "AAAA=",
        "AAAA====",
        "A===",
        "====",
        "=",
        "AA=A",
        "AAAA%3D",
        "AAA\N{NO-BREAK SPACE}A",
        "AAAA\0",
        "AAAA,AAAA",
        "\ud800AAA",
        "ＡＡＡＡ",
    ],
)
def test_base64_that_is_not_strict(payload: str) -> None:
    with pytest.raises(ImageError) as refusal:
        read("data:image/png;base64," + payload)
    assert refusal.value.code == "invalid_base64_image"
    assert payload not in refusal.value.message


@pytest.mark.parametrize("payload", ["", " ", "\r\n"])
def test_an_empty_payload_is_an_empty_file(payload: str) -> None:
    with pytest.raises(ImageError) as refusal:
        read("data:image/png;base64," + payload)
    assert refusal.value.code == "empty_image_file"


@pytest.mark.parametrize("size", [29, 30, 31, 32])
def test_the_byte_cap_is_exact(size: int) -> None:
    limits = ImageLimits(max_file_bytes=30)
    url = "data:image/png;base64," + base64.b64encode(b"x" * size).decode()
    if size <= 30:
        assert len(read(url, limits)) == size
        return
    with pytest.raises(PayloadTooLarge) as refusal:
        read(url, limits)
    assert (refusal.value.status, refusal.value.code) == (413, "image_file_too_large")


def test_forty_megabytes_are_refused_without_a_copy() -> None:
    url = "data:image/png;base64," + "A" * 40_000_000
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge):
            read(url)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@settings(derandomize=True, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=200), gaps=st.lists(st.sampled_from(" \n\r\t\f"), max_size=8), at=st.integers(0)
)
def test_every_file_comes_back_as_it_was(data: bytes, gaps: list[str], at: int) -> None:
    text = base64.b64encode(data).decode()
    cut = at % (len(text) + 1)
    limits = ImageLimits()
    assert read("data:image/png;base64," + text[:cut] + "".join(gaps) + text[cut:], limits) == data


PIECES = st.sampled_from(
    [
        *(
            "data:",
            "DATA:",
            "image/png",
            "image/svg+xml",
            "text/html",
            "video/jpeg",
            ";",
            ";base64",
            ";BASE64",
            ",",
            "=",
        ),
        *(
            "AAAA",
            "AA==",
            "AAA=",
            "A===",
            "====",
            "QUJD",
            "-_-_",
            "%41",
            " ",
            "\r\n",
            "\t",
            "\0",
            "ü",
            "ＡＡ",
            ";charset=utf-8",
        ),
    ]
)


@FUZZ
@given(
    st.text(max_size=60)
    | st.text(max_size=60).map("data:image/png;base64,".__add__)
    | st.lists(PIECES, max_size=10).map("".join)
    | st.lists(PIECES, max_size=10).map(lambda pieces: "data:image/png;base64," + "".join(pieces))
)
def test_any_text_is_read_or_refused(url: str) -> None:
    try:
        data = read(url)
    except ImageError:
        return
    payload = "".join(url.partition(",")[2].split())
    assert base64.b64encode(data).decode()[:-4] == payload[:-4]
