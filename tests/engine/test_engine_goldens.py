"""Both reference checkpoints through the whole engine: the originals' ids, all cases in one batch."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from engine_fakes import make_driver
from safetensors.torch import load_file

from omnilmm.config import EngineConfig
from omnilmm.engine.plan import Draw
from omnilmm.engine.sampling import distribution
from omnilmm.messages import Embedding, GenerateCall, ImageInput, Prompt, Sampling, Span
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import read_model_config
from omnilmm.models.weights import load_language_model

DATA = Path(__file__).parents[1] / "data"
FAMILIES = ["omnilmm-12b-tiny", "minicpm-v-tiny"]
BOS = 1
CONFIG = EngineConfig(num_blocks=128, block_size=16, max_step_tokens=100, max_sequences=16, max_context=512)


@cache
def load(family: str):
    folder = DATA / family
    goldens = json.loads((folder / "goldens.json").read_text())
    model = load_language_model(folder, read_model_config(folder), dtype="float32")
    return model, goldens, load_file(folder / "goldens.safetensors")


def make_call(case: dict, goldens: dict, tensors: dict, sampling: Sampling) -> GenerateCall:
    ids = tuple(case["input_ids"])
    if "image_bound" in case:
        ((start, end),) = case["image_bound"]
    else:
        patch = goldens["tokens"]["im_patch"]
        start, end = ids.index(patch), len(ids) - ids[::-1].index(patch)
    vectors = tensors[f"image.{case['image']}.resampler"]
    embedding = Embedding("float32", tuple(vectors.shape), vectors.contiguous().numpy().tobytes())
    images = (ImageInput(case["image"], start, end - start, embedding),)
    return GenerateCall("r", Prompt(ids, (Span(start, end - start, 0),), (BOS,)), images, sampling)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("run", ["greedy", "greedy_reppen", "greedy_eos"])
def test_greedy_goldens(family, run):
    model, goldens, tensors = load(family)
    calls = []
    for case in goldens["cases"]:
        golden = case.get(run)
        if golden is None:
            continue
        stop_ids = (golden["eos_token_id"],) if "eos_token_id" in golden else ()
        penalty = golden.get("repetition_penalty", 1.0)
        sampling = Sampling(max_tokens=24, repetition_penalty=penalty, stop_ids=stop_ids)
        calls.append((make_call(case, goldens, tensors, sampling), golden))
    answers = make_driver(model, CONFIG).run(*(call for call, _ in calls))
    assert len(calls) >= 1
    assert [[BOS, *answer.ids] for answer in answers] == [golden["sequence_ids"] for _, golden in calls]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_sample_probabilities(family):
    model, goldens, tensors = load(family)
    for case in goldens["cases"]:
        golden = case["sample"]
        sampling = Sampling(
            max_tokens=24,
            temperature=golden["temperature"],
            top_k=golden["top_k"],
            top_p=golden["top_p"],
            repetition_penalty=golden.get("repetition_penalty", 1.0),
        )
        call = make_call(case, goldens, tensors, sampling)
        expected = tensors[f"{case['image']}|{case['conversation']}.sample_probs"]
        drawn = tuple(golden["sequence_ids"][1 : len(expected)])
        embeds = model.embed(torch.tensor(call.prompt.ids + drawn))
        image = call.images[0]
        embeds[image.start : image.start + image.length] = tensors[f"image.{image.key}.resampler"]
        hidden = model(embeds, torch.arange(len(embeds)), DenseAttend(model.config.num_layers))
        logits = model.logits(hidden[-len(expected) :])
        draws = [Draw(sampling, step, seen=(BOS, *drawn[:step])) for step in range(len(expected))]
        ours = distribution(logits, draws).float()
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
        assert (ours > 0).sum(-1).tolist() == golden["nonzero_per_step"]
