"""The vision tower against the goldens of both families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from omnilmm.models.vision import VisionTower

TOLERANCE = 2e-4


def test_pixels_are_those_of_the_goldens(reference: Any, picture: str) -> None:
    pixels = reference.pixels(picture)[0]
    side = pixels.shape[-1]
    assert_close(pixels[:, :8, :8], reference.tensors[f"image.{picture}.pixel_corner"], atol=1e-6, rtol=0)
    assert_close(pixels[:, side // 2], reference.tensors[f"image.{picture}.pixel_centre_row"], atol=1e-6, rtol=0)


def every_token(tower: VisionTower, pixels: Tensor) -> Tensor:
    """(tokens, width): what the final norm gives, with the class token where the tower has one."""
    outputs: list[Tensor] = []
    hook = tower.norm.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    tower(pixels)
    hook.remove()
    return outputs[0]


def assert_statistics(features: Tensor, golden: dict[str, Any]) -> None:
    assert list(features.shape) == golden["shape"]
    assert features.mean().item() == pytest.approx(golden["mean"], abs=1e-5)
    assert features.std(correction=0).item() == pytest.approx(golden["std"], abs=1e-5)
    assert features.min().item() == pytest.approx(golden["min"], abs=TOLERANCE)
    assert features.max().item() == pytest.approx(golden["max"], abs=TOLERANCE)
    assert features.double().norm().item() == pytest.approx(golden["l2"], rel=1e-5)


def test_features_of_every_picture(reference: Any, picture: str) -> None:
    golden, pixels = reference.goldens["images"][picture], reference.pixels(picture)
    assert_statistics(reference.encoder.vision_features(pixels)[0], golden["vision_features"])
    tokens = every_token(reference.encoder.vision, pixels)
    assert_statistics(tokens, golden.get("vision_features_with_cls", golden["vision_features"]))
    assert_close(tokens[0, :8], torch.tensor(golden["vision_features_first8"]), atol=TOLERANCE, rtol=0)


def test_every_number_of_one_picture(reference: Any) -> None:
    picture = reference.goldens["full_image"]
    golden = reference.tensors[f"image.{picture}.vision_features"]  # with the class token, where there is one
    pixels = reference.pixels(picture)
    assert_close(every_token(reference.encoder.vision, pixels), golden, atol=TOLERANCE, rtol=0)
    patches = golden[int(reference.config.vision.has_class_token) :]
    assert_close(reference.encoder.vision_features(pixels)[0], patches, atol=TOLERANCE, rtol=0)


def test_output_of_every_block(reference: Any, picture: str) -> None:
    tower, outputs = reference.encoder.vision, []
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[2][0])) for block in tower.blocks]
    tower(reference.pixels(picture))
    for hook in hooks:
        hook.remove()
    goldens = reference.goldens["images"][picture]["vision_block_outputs"]
    if reference.config.vision.has_class_token:
        outputs.append(outputs[-1])  # there the original keeps an identity in the dropped block's place
    assert len(outputs) == len(goldens)
    for output, golden in zip(outputs, goldens, strict=True):
        assert output.mean().item() == pytest.approx(golden["mean"], abs=1e-5)
        assert output.std(correction=0).item() == pytest.approx(golden["std"], abs=1e-5)
        (row,) = [key for key in golden if key.endswith("_first4")]
        token = int(row.removeprefix("token").removesuffix("_first4"))
        assert_close(output[token, :4], torch.tensor(golden[row]), atol=TOLERANCE, rtol=0)


def test_pictures_of_a_batch_do_not_meet(reference: Any) -> None:
    first, second = reference.pixels("china.jpg"), reference.pixels("coins_gray.png")
    together = reference.encoder(torch.cat((first, second)))
    assert_close(together[:1], reference.encoder(first), atol=2e-5, rtol=0)
    assert_close(together[1:], reference.encoder(second), atol=2e-5, rtol=0)


def test_a_bias_on_the_keys_would_change_nothing(reference: Any) -> None:
    attention = reference.encoder.vision.blocks[0].attention
    width = reference.config.vision.width
    keys = attention.qkv.bias[width : 2 * width]
    assert bool(keys.any()) is reference.config.vision.has_key_bias
    x = torch.randn(1, 9, width)
    before, kept = attention(x), keys.clone()
    keys += 1.0
    try:
        assert_close(attention(x), before, atol=1e-5, rtol=0)
    finally:
        keys.copy_(kept)
