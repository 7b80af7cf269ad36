"""The two reference checkpoints with their golden outputs, and what the tests of models/ ask of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from omnilmm.config import InputHandling
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.vision import ImageEncoder
from omnilmm.models.weights import load_encoder, load_language_model

DATA = Path(__file__).parents[1] / "data"
RESIZED_DIFFERENTLY = "worldmap_tall.jpg"  # by Pillow 13 than by the original, whose result is stored
NOT_SHIPPED = "worldmap_ck.jpg"


class Reference:
    """One checkpoint and everything the original computed with it. Models are loaded once, in float32."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = DATA / name
        self.goldens: dict[str, Any] = json.loads((self.folder / "goldens.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "goldens.safetensors")

    @cached_property
    def config(self) -> ModelConfig:
        return read_model_config(self.folder)

    @cached_property
    def encoder(self) -> ImageEncoder:
        return load_encoder(self.folder, self.config, dtype="float32")

    @cached_property
    def language_model(self) -> LanguageModel:
        return load_language_model(self.folder, self.config, dtype="float32")

    @property
    def full_case(self) -> dict[str, Any]:
        """The case whose input embeddings and hidden states are stored."""
        return next(case for case in self.goldens["cases"] if case_name(case) == self.goldens["full_case"])

    @cache  # noqa: B019  the two references live as long as the test run
    def pixels(self, picture: str) -> Tensor:
        """(1, 3, side, side) float32, made with Pillow and numpy alone."""
        policy = self.config.image_policy(InputHandling.ORIGINAL)
        if picture == RESIZED_DIFFERENTLY:
            image = Image.open(DATA / "images" / "resized" / "worldmap_tall_448.png")
        else:
            image = Image.open(picture_path(picture)).convert("RGB")
            image = image.resize((policy.side, policy.side), Image.Resampling.BICUBIC)
        levels = np.asarray(image, dtype=np.float32) / np.float32(255)  # (side, side, 3)
        levels = (levels - np.asarray(policy.mean, np.float32)) / np.asarray(policy.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(levels.transpose(2, 0, 1))).unsqueeze(0)

    @cache  # noqa: B019
    def vectors(self, picture: str) -> Tensor:
        """(num_query, hidden): the picture as our encoder sees it."""
        with torch.inference_mode():
            return self.encoder(self.pixels(picture))[0]

    def picture_rows(self, case: dict[str, Any]) -> Tensor:
        """(n_tokens,) bool: the positions that the picture's vectors overwrite."""
        ids = torch.tensor(case["input_ids"])
        if "image_bound" not in case:
            return ids == self.goldens["tokens"]["im_patch"]
        rows = torch.zeros_like(ids, dtype=torch.bool)
        for start, end in case["image_bound"]:
            rows[start:end] = True
        return rows

    def embeds(self, case: dict[str, Any]) -> Tensor:
        """(n_tokens, hidden): text embeddings with the picture in its place, all of it our own work."""
        embeds = self.language_model.embed(torch.tensor(case["input_ids"]))
        embeds[self.picture_rows(case)] = self.vectors(case["image"])
        return embeds

    def prefill(self, embeds: Tensor) -> tuple[Tensor, DenseAttend]:
        """Hidden states (T, hidden) after the final norm, and the keys and values they left."""
        attend = DenseAttend(self.config.language.num_layers)
        return self.language_model(embeds, torch.arange(len(embeds)), attend), attend


REFERENCES = (Reference("omnilmm-12b-tiny"), Reference("minicpm-v-tiny"))


def case_name(case: dict[str, Any]) -> str:
    return f"{case['image']}|{case['conversation']}"


def picture_path(picture: str) -> Path:
    folder = os.environ.get("OMNILMM_REFERENCE_IMAGES")
    return Path(folder) / picture if picture == NOT_SHIPPED and folder else DATA / "images" / picture


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`reference` alone runs once per family; with `picture` or `case`, once for each the family has goldens for."""
    wanted = set(metafunc.fixturenames)
    if "case" in wanted:
        pairs = [(ref, case, case["image"], case_name(case)) for ref in REFERENCES for case in ref.goldens["cases"]]
        metafunc.parametrize(("reference", "case"), [_param(*pair) for pair in pairs])
    elif "picture" in wanted:
        pictures = [(ref, picture, picture, picture) for ref in REFERENCES for picture in ref.goldens["images"]]
        metafunc.parametrize(("reference", "picture"), [_param(*pair) for pair in pictures])
    elif "reference" in wanted:
        metafunc.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)


def _param(reference: Reference, value: Any, picture: str, name: str) -> Any:
    absent = pytest.mark.skipif(
        not picture_path(picture).is_file(), reason=f"{picture} is not shipped: set OMNILMM_REFERENCE_IMAGES"
    )
    return pytest.param(reference, value, marks=absent, id=f"{reference.name}-{name}")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
