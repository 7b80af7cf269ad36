"""What a GPU is used for: decode against its memory, prefill and encode against its matrix products.

    python tests/bench/gpu.py [--model 3b] [--model 12b]
    python tests/bench/gpu.py --tiny          # the program itself, on CPU: its figures mean nothing

Weights are random and have the official models' shapes; every figure goes through the parts that serve.

decode    steps of the engine's runner, one token for each of 1, 16 and 64 sequences, greedy, until the ids are on the
          host. Its roofline: the weights but the input embedding, and the keys and values of all sequences, read once
          at the rate of a large copy (bytes read + written / time). With and without CUDA graphs.
prefill   one step of the runner over a chunk. Two operations for each weight it is multiplied with and each token, and
          attention's two products, over the rate of a large product in the same dtype.
encode    batches of the vision pool's core's model, likewise; operations counted by torch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_models import make_encoder, make_language, num_parameters, read_config
from torch.utils.flop_counter import FlopCounterMode

from omnilmm.config import EngineConfig
from omnilmm.encoder.graphs import EncodeGraphs
from omnilmm.engine.plan import Draw, Plan, Row
from omnilmm.engine.runner import ModelRunner
from omnilmm.messages import Sampling
from omnilmm.models.config import LanguageConfig, ModelConfig
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.weights import empty_encoder

REFUSAL = "tests/bench/gpu.py measures a CUDA device, and torch sees none (--tiny tries the program itself on CPU)"


@dataclass(frozen=True)
class Load:
    """How much of everything. Tokens, sequences, pictures."""

    batches: tuple[int, ...] = (1, 16, 64)
    context: int = 512
    chunks: tuple[int, ...] = (512, 2048)
    pictures: tuple[int, ...] = (1, 4, 16)
    block_size: int = 64
    copy_bytes: int = 4 * 1024**3
    product_side: int = 8192
    repeats: int = 20


TINY = Load((1, 3), 40, (48,), (1, 2), 16, 1024**2, 64, 2)


class Device:
    """Where it runs, and how long things take there."""

    def __init__(self, is_tiny: bool) -> None:
        self.torch = torch.device("cpu" if is_tiny else "cuda")
        self.dtype = torch.float32 if is_tiny else torch.bfloat16

    def wait(self) -> None:
        if self.torch.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Median of a call, its end awaited, after three that warm up."""
        taken = []
        for _ in range(repeats + 3):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken[3:])

    def copy_rate(self, load: Load) -> float:
        """Bytes per second, read and written together."""
        source = torch.ones(load.copy_bytes // 4, device=self.torch)
        target = torch.zeros_like(source)
        return 2 * load.copy_bytes / self.seconds(lambda: target.copy_(source), load.repeats)

    def product_rate(self, load: Load) -> float:
        """Operations per second of a square product."""
        a, b = torch.randn(2, load.product_side, load.product_side, dtype=self.dtype, device=self.torch)
        return 2 * load.product_side**3 / self.seconds(lambda: a @ b, load.repeats)

    def describe(self) -> str:
        if self.torch.type != "cuda":
            return "CPU: a trial of this program, no measurement"
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def rows_of(num_sequences: int, start: int, count: int, block_size: int, vocab_size: int) -> Plan:
    """Each sequence gets `count` tokens computed behind `start` others, and draws."""
    num_blocks = -(-(start + count) // block_size)
    rows = (
        Row(
            sequence_id=index,
            ids=tuple((7 * index + token) % vocab_size for token in range(count)),
            start=start,
            block_ids=tuple(range(index * num_blocks, (index + 1) * num_blocks)),
            draw=Draw(Sampling(max_tokens=64), position=5),
        )
        for index in range(num_sequences)
    )
    return Plan(tuple(rows))


def step_bytes(model: LanguageModel, num_sequences: int, context: int) -> int:
    """What a decode step reads at the least."""
    config, itemsize = model.config, model.embedding.weight.itemsize
    unread = 0 if config.is_tied else model.embedding.weight.numel()
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim * num_sequences * context
    return (num_parameters(model) - unread + cached) * itemsize


def prefill_operations(model: LanguageModel, num_tokens: int) -> int:
    """Of a chunk from position 0 on; logits of its last token only."""
    config = model.config
    tables = model.embedding.weight.numel() * (1 if config.is_tied else 2)
    attention = 2 * 2 * config.num_layers * config.num_heads * config.head_dim * num_tokens * (num_tokens + 1) // 2
    return 2 * (num_parameters(model) - tables) * num_tokens + attention + 2 * model.embedding.weight.numel()


def encode_operations(config: ModelConfig) -> int:
    """Of one picture. Counted over a model without memory."""
    assert config.vision is not None
    model = empty_encoder(config).requires_grad_(False)
    pixels = torch.empty(1, 3, config.vision.side, config.vision.side, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(pixels)
    return counter.get_total_flops()


def engine_config(load: Load, language: LanguageConfig) -> EngineConfig:
    longest = max(*load.chunks, load.context)
    room = max(load.context * max(load.batches), longest) // load.block_size + 2 * max(load.batches)
    return EngineConfig(
        num_blocks=room,
        block_size=load.block_size,
        max_step_tokens=longest,
        max_sequences=max(load.batches),
        max_context=min(language.max_context, 2 * longest),
    )


def bench_language(device: Device, load: Load, config: ModelConfig, *, copy_rate: float, product_rate: float) -> None:
    model = make_language(config, device.dtype, device.torch)
    room = engine_config(load, config.language)
    kinds = {"as chosen": room}
    if device.torch.type == "cuda":
        kinds |= {
            "no graphs": room.resolve(cuda_graphs=False),
            "gathered": room.resolve(attention="gathered"),
        }
    print("\n| decode | backend | tok/s | ms a step | roofline tok/s | share |\n|---|---|---|---|---|---|")
    for kind, settings in kinds.items():
        begun = time.perf_counter()
        runner = ModelRunner(model, settings)
        ready = time.perf_counter() - begun
        for batch in load.batches:
            plan = rows_of(batch, load.context - 1, 1, load.block_size, config.language.vocab_size)
            seconds = device.seconds(lambda runner=runner, plan=plan: runner.run(plan), load.repeats)
            best = batch * copy_rate / step_bytes(model, batch, load.context)
            share = batch / seconds / best
            print(f"| x{batch} | {kind} | {batch / seconds:.1f} | {1e3 * seconds:.2f} | {best:.1f} | {share:.0%} |")
        print(f"| | {kind}: ready after {ready:.0f} s | | | | |")
    print("\n| prefill | tok/s | ms | share of the product's rate |\n|---|---|---|---|")
    runner = ModelRunner(model, room)
    for chunk in load.chunks:
        plan = rows_of(1, 0, chunk, load.block_size, config.language.vocab_size)
        seconds = device.seconds(lambda plan=plan: runner.run(plan), load.repeats)
        share = prefill_operations(model, chunk) / seconds / product_rate
        print(f"| {chunk} tokens | {chunk / seconds:.0f} | {1e3 * seconds:.1f} | {share:.0%} |")


@torch.inference_mode()
def bench_encoder(device: Device, load: Load, config: ModelConfig, *, product_rate: float) -> None:
    assert config.vision is not None
    model = make_encoder(config, device.dtype, device.torch)
    side, operations = config.vision.side, encode_operations(config)
    kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"plain": model}
    if device.torch.type == "cuda":
        kinds = {"graphs": EncodeGraphs(model, max_batch=max(load.pictures), side=side).run, **kinds}
    print(f"\n{operations / 1e9:.1f} G operations a picture")
    print("\n| encode | | pictures/s | ms a batch | share of the product's rate |\n|---|---|---|---|---|")
    for kind, encode in kinds.items():
        for size in load.pictures:
            pixels = torch.randn(size, 3, side, side, device=device.torch, dtype=device.dtype)
            seconds = device.seconds(lambda encode=encode, pixels=pixels: encode(pixels), load.repeats)
            share = size * operations / seconds / product_rate
            print(f"| x{size} | {kind} | {size / seconds:.1f} | {1e3 * seconds:.2f} | {share:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=["3b", "12b"], help="may be repeated; both if not given")
    parser.add_argument("--tiny", action="store_true", help="toys on CPU, to try this program")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        sys.exit(REFUSAL)
    device, load = Device(args.tiny), TINY if args.tiny else Load()
    copy_rate, product_rate = device.copy_rate(load), device.product_rate(load)
    print(f"{device.describe()}, torch {torch.__version__}, {device.dtype}")
    print(f"copy {copy_rate / 1e9:.0f} GB/s read and written, product {product_rate / 1e12:.3g} T operations/s")
    print(f"context {load.context}, block_size {load.block_size}, medians of {load.repeats}")
    for size in args.model or ["3b", "12b"]:
        config = read_config(size, is_tiny=args.tiny)
        print(f"\n## {size}{', tiny' if args.tiny else ''}")
        bench_language(device, load, config, copy_rate=copy_rate, product_rate=product_rate)
        bench_encoder(device, load, config, product_rate=product_rate)


if __name__ == "__main__":
    main()
