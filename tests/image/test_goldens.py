"""The reference pictures of both families, byte for byte: what the original programs fed their vision towers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from omnilmm.config import ImageLimits, ImagePolicy, InputHandling
from omnilmm.image.transform import decode, normalise, prepare, squash

DATA = Path(__file__).parents[1] / "data"
FAMILIES = {
    "omnilmm-12b-tiny": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "minicpm-v-tiny": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
SIDE = 448
GOLDENS = {family: json.loads((DATA / family / "goldens.json").read_text())["images"] for family in FAMILIES}
CASES = [(family, name) for family in FAMILIES for name in GOLDENS[family]]


def file_of(name: str) -> bytes:
    path = DATA / "images" / name
    if not path.exists():
        path = Path(os.environ.get("OMNILMM_REFERENCE_IMAGES", "/nowhere")) / name
    if not path.exists():
        pytest.skip(f"{name} is not shipped with the tests")
    return path.read_bytes()


def policy_of(family: str) -> ImagePolicy:
    mean, std = FAMILIES[family]
    return ImagePolicy(SIDE, mean, std, InputHandling.ORIGINAL)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def original_square(golden: dict[str, Any], name: str) -> bytes:
    """The resized picture as the original had it, also where today's Pillow resizes a little differently."""
    if "resized_png" in golden:
        return Image.open(DATA / "images" / golden["resized_png"].removeprefix("../images/")).tobytes()
    return squash(decode(file_of(name), InputHandling.ORIGINAL, ImageLimits()), SIDE)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_decoded_and_resized_bytes(family: str, name: str) -> None:
    golden = GOLDENS[family][name]
    image = decode(file_of(name), InputHandling.ORIGINAL, ImageLimits())
    assert list(image.size) == golden["size_wh"]
    assert digest(image.tobytes()) == golden["rgb_uint8_sha256"]
    square = squash(image, SIDE)
    allowed = golden["pillow13_max_level_difference"]
    if not allowed:
        assert digest(square) == golden["resized_uint8_sha256"]
        return
    ours, theirs = (np.frombuffer(data, np.uint8).astype(int) for data in (square, original_square(golden, name)))
    assert np.abs(ours - theirs).max() <= allowed


@pytest.mark.parametrize(("family", "name"), CASES)
def test_tensors_are_equal_to_the_last_bit(family: str, name: str) -> None:
    golden = GOLDENS[family][name]
    square = original_square(golden, name)
    assert digest(square) == golden["resized_uint8_sha256"]
    tensor = normalise(square, policy_of(family))
    assert (tensor.dtype, tensor.shape, tensor.flags.c_contiguous) == (np.float32, (3, SIDE, SIDE), True)
    assert digest(tensor.tobytes()) == golden["pixel_values_sha256"]
    stored = load_file(DATA / family / "goldens.safetensors")
    np.testing.assert_array_equal(tensor[:, :8, :8], stored[f"image.{name}.pixel_corner"])
    np.testing.assert_array_equal(tensor[:, SIDE // 2], stored[f"image.{name}.pixel_centre_row"])


@pytest.mark.parametrize("name", ["china.jpg", "coins_gray.png", "worldmap_tall.jpg"])
def test_both_ways_of_handling_agree_on_ordinary_pictures(name: str) -> None:
    data = file_of(name)
    original = policy_of("minicpm-v-tiny")
    one, two = (
        prepare(data, policy=original.resolve(handling=handling), limits=ImageLimits(), param="p")
        for handling in InputHandling
    )
    assert one == two


def test_safe_handling_lays_the_cat_on_white() -> None:
    stored = np.asarray(Image.open(DATA / "images" / "cat_alpha.png")).astype(float)
    colour, alpha = stored[..., :3], stored[..., 3:] / 255
    safe = np.asarray(decode(file_of("cat_alpha.png"), InputHandling.SAFE, ImageLimits()))
    assert np.abs(safe - (colour * alpha + 255 * (1 - alpha))).max() <= 1


def test_safe_handling_turns_the_flower() -> None:
    original = decode(file_of("flower_exif6.jpg"), InputHandling.ORIGINAL, ImageLimits())
    safe = decode(file_of("flower_exif6.jpg"), InputHandling.SAFE, ImageLimits())
    assert np.array_equal(np.asarray(safe), np.rot90(np.asarray(original), -1))
