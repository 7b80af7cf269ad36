"""What half precision and 8-bit weights change in a real checkpoint's answers.

    python tests/bench/agreement.py --model FOLDER

Three questions. How far are the logits of each precision from float32's, on the texts in this repository? How many
greedy answers come out differently when 16 run together from when each runs alone, and how close were the two tokens
where they part? And what would it cost to rule that out, by computing every product in pieces of one fixed shape?
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bench_prompts import PromptMaker
from torch import Tensor, nn
from torch.nn import functional

from omnilmm.config import EngineConfig, Family
from omnilmm.engine.engine import Engine, Tokens
from omnilmm.engine.runner import ModelRunner
from omnilmm.messages import GenerateCall, Prompt, Sampling
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.decoder import DecoderLayer, LanguageModel
from omnilmm.models.packed import PackedLayer, PackedLinear, WeightDtype, load_for_decoding
from omnilmm.models.weights import load_language_model
from omnilmm.prompt.template import load_template

ROOT = Path(__file__).parents[2]
WINDOW = 512
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Precision:
    name: str
    dtype: str
    weight_dtype: WeightDtype | None = None

    def load(self, folder: Path, config: ModelConfig) -> LanguageModel:
        return load_for_decoding(folder, config, dtype=self.dtype, weight_dtype=self.weight_dtype)


FLOAT32 = Precision("float32", "float32")
BFLOAT16 = Precision("bfloat16", "bfloat16")
OTHERS = (BFLOAT16, Precision("bfloat16, int8 weights", "bfloat16", "int8"))


# -- logits -------------------------------------------------------------------------------------------


def windows(folder: Path, count: int) -> Tensor:
    """(count, WINDOW) ids of running text."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "README.md"))
    ids = load_template(Family.TEXT, folder).tokenizer.encode_parsed(text)
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


@torch.inference_mode()
def log_probabilities(model: LanguageModel, ids: Tensor) -> Iterator[Tensor]:
    """(WINDOW, vocab) float32 for each window."""
    for window in ids:
        attend = DenseAttend(model.config.num_layers)
        hidden = model(model.embed(window), torch.arange(WINDOW), attend)
        yield model.logits(hidden).log_softmax(dim=-1)


def print_losses(folder: Path, config: ModelConfig, count: int) -> None:
    ids = windows(folder, count)
    reference = list(log_probabilities(FLOAT32.load(folder, config), ids))
    print(f"logits on {ids.numel()} tokens of text, against float32")
    print(f"  {'':24} {'best token agrees':>18} {'KL, nats':>10} {'perplexity':>11}")
    print(f"  {'float32':24} {'':>18} {'':>10} {_perplexity(reference, ids):11.3f}")
    for precision in OTHERS:
        theirs = list(log_probabilities(precision.load(folder, config), ids))
        pairs = list(zip(reference, theirs, strict=True))
        agree = statistics.mean((a.argmax(-1) == b.argmax(-1)).float().mean().item() for a, b in pairs)
        distance = statistics.mean((a.exp() * (a - b)).sum(-1).mean().item() for a, b in pairs)
        print(f"  {precision.name:24} {100 * agree:16.2f} % {distance:10.5f} {_perplexity(theirs, ids):11.3f}")


def _perplexity(log_probs: Sequence[Tensor], ids: Tensor) -> float:
    chosen = [row[:-1].gather(-1, window[1:, None]) for row, window in zip(log_probs, ids, strict=True)]
    return math.exp(-torch.cat(chosen).mean().item())


# -- alone and together -------------------------------------------------------------------------------


def answers(model: LanguageModel, prompts: Sequence[Ids], num_tokens: int, together: int) -> list[Ids]:
    """Greedy answers, so many sequences at a time."""
    config = EngineConfig(max_sequences=together)
    engine = Engine(ModelRunner(model, config), config)
    sampling = Sampling(max_tokens=num_tokens)
    calls = [GenerateCall(str(n), Prompt(ids, (), ()), (), sampling) for n, ids in enumerate(prompts)]
    numbers = [engine.submit(call).sequence_id for call in calls]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while not engine.is_empty:
        for output in engine.step():
            assert isinstance(output, Tokens)
            found[output.sequence_id] += output.batch.ids
    return [tuple(found[number]) for number in numbers]


@torch.inference_mode()
def margin(model: LanguageModel, ids: Ids) -> float:
    """Difference of the two best logits behind `ids`."""
    hidden = model(model.embed(torch.tensor(ids)), torch.arange(len(ids)), DenseAttend(model.config.num_layers))
    best = model.logits(hidden[-1:])[0].topk(2).values
    return (best[0] - best[1]).item()


def print_agreement(model: LanguageModel, prompts: Sequence[Ids], num_tokens: int, name: str) -> None:
    alone, together = (answers(model, prompts, num_tokens, count) for count in (1, 16))
    num_same = sum(a == b for a, b in zip(alone, together, strict=True))
    partings = []
    num_before = 0
    for prompt, a, b in zip(prompts, alone, together, strict=True):
        at = next((index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), num_tokens)
        num_before += at
        if at < num_tokens:
            partings.append(margin(model, prompt + a[:at]))
    num_drawn = num_before + len(partings)
    print(f"\n{name}: {len(prompts)} prompts, {num_tokens} tokens each, greedy, alone and 16 together")
    print(f"  {num_same} of {len(prompts)} answers are the same")
    print(f"  {len(partings)} of {num_drawn} tokens drawn after equal beginnings differ")
    if partings:
        middle, most = statistics.median(partings), max(partings)
        print(f"  margin of the two best logits there: median {middle:.3f}, most {most:.3f}")


# -- the price of never differing ---------------------------------------------------------------------


class FixedRows(nn.Module):
    """A linear layer computed `num_rows` rows at a time, padded, so that no row's sum depends on how many there are."""

    def __init__(self, linear: nn.Module, num_rows: int) -> None:
        super().__init__()
        self._linear, self._num_rows = linear, num_rows

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        padded = functional.pad(x, (0, 0, 0, -len(x) % self._num_rows))
        out = torch.cat([self._linear(piece) for piece in padded.split(self._num_rows)])[: len(x)]
        return out if residual is None else out + residual


def load_with_fixed_rows(folder: Path, config: ModelConfig, num_rows: int) -> LanguageModel:
    """Every matrix is multiplied with so many rows at a time."""
    model = load_language_model(folder, config, dtype="bfloat16")
    model.replace_head(FixedRows(PackedLinear(model.output_matrix), num_rows))
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        model.layers[index] = PackedLayer(layer, lambda weight: FixedRows(PackedLinear(weight), num_rows))
    return model


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


@torch.inference_mode()
def print_price(folder: Path, config: ModelConfig) -> None:
    """Products only: attention and everything else come on top, in either mode."""
    print("\nproducts of one step, computed at once and 16 rows at a time (bfloat16)")
    usual, fixed = BFLOAT16.load(folder, config), load_with_fixed_rows(folder, config, 16)
    for num_rows in (1, 4, 16, 128, 512):
        x = torch.randn(num_rows, config.language.hidden).bfloat16()
        usually, always = (seconds(partial(_products, model, x), 9) for model in (usual, fixed))
        ratio = always / usually
        print(f"  {num_rows:4} rows: {1e3 * usually:7.2f} ms and {1e3 * always:7.2f} ms, {ratio:.2f} times")
    x = torch.randn(16, config.language.hidden).bfloat16()
    for name, model in (("at once", usual), ("16 rows at a time", fixed)):
        whole = _products(model, x)
        differ = sum(not torch.equal(_products(model, x[row : row + 1])[0], whole[row]) for row in range(16))
        print(f"  {name}: {differ} of 16 rows differ from themselves alone")


def _products(model: LanguageModel, x: Tensor) -> Tensor:
    """A pass without attention: every matrix is read once."""
    positions = torch.zeros(len(x), dtype=torch.int64)
    return model.logits(model(x, positions, lambda layer, q, k, v: q)[:16])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a text checkpoint")
    parser.add_argument("--windows", type=int, default=6, help=f"of {WINDOW} tokens, to compare logits on")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="length of the answers")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = read_model_config(args.model)
    print_losses(args.model, config, args.windows)
    prompts = [prompt.ids for prompt in PromptMaker(args.model, num_tokens=64).make(args.prompts, seed=5)]
    for precision in (FLOAT32, *OTHERS):
        print_agreement(precision.load(args.model, config), prompts, args.tokens, precision.name)
    print_price(args.model, config)


if __name__ == "__main__":
    main()
