"""Where the time of a step goes.

    python tests/bench/profile_step.py --model FOLDER [--threads 1] [--torch]

Runs prompts of 128 tokens and steps of 1, 4 and 16 sequences through the engine's own runner, without scheduler, server
and Ray: first untouched, for the time of a step; then under torch's profiler, for the shares of its operators. One
thread gives the clearest picture, and CPU time is counted, so what else runs on the machine matters little. Where our
own kernels are used, they are two of the operators (a layer, and a product on its own); with --torch they are not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from omnilmm.config import EngineConfig
from omnilmm.engine.plan import Draw, Plan, Row
from omnilmm.engine.runner import ModelRunner
from omnilmm.messages import Sampling
from omnilmm.models.config import read_model_config
from omnilmm.models.native import Kernels, try_kernels
from omnilmm.models.packed import can_use_kernels, prepare_for_decoding
from omnilmm.models.weights import load_language_model

NUM_STEPS = 20
NUM_PROMPT_TOKENS = 128
MAX_BLOCKS = 60
KINDS: Mapping[str, tuple[str, ...]] = {
    "whole layers by our kernels": ("ours::layer",),
    "matrix products of the weights": (
        "ours::linear",
        "mkldnn::_linear_pointwise",
        "aten::_weight_int8pack",
        "aten::mm",
    ),
    "attention": ("aten::_scaled_dot_product", "aten::bmm", "aten::_softmax", "aten::baddbmm"),
    "keys and values in and out of the pool": ("aten::index_copy", "aten::index_select"),
    "choosing the token": ("aten::argmax",),
}


def seen_by_profiler(kernels: Kernels) -> Kernels:
    for name in ("linear", "layer"):
        setattr(kernels, name, partial(recorded, f"ours::{name}", getattr(kernels, name)))
    return kernels


def recorded(name: str, call: Callable[..., None], *args: int) -> None:
    with record_function(name):
        call(*args)


def plan_of(num_sequences: int, context: int, block_size: int, *, num_tokens: int = 1) -> Plan:
    """A step in which every sequence gets its last `num_tokens` of `context`."""
    num_blocks = -(-context // block_size)
    rows = [
        Row(
            sequence_id=index,
            ids=tuple(range(1000 + index, 1000 + index + num_tokens)),
            start=context - num_tokens,
            block_ids=tuple(range(index * MAX_BLOCKS, index * MAX_BLOCKS + num_blocks)),
            draw=Draw(Sampling(max_tokens=64), position=5),
        )
        for index in range(num_sequences)
    ]
    return Plan(tuple(rows))


def step_seconds(runner: ModelRunner, plans: Sequence[Plan]) -> float:
    """Median CPU time of a step."""
    seconds = []
    for plan in plans:
        begun = time.process_time()
        runner.run(plan)
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds[5:])


def print_prompt(runner: ModelRunner, num_sequences: int, block_size: int) -> None:
    plan = plan_of(num_sequences, NUM_PROMPT_TOKENS, block_size, num_tokens=NUM_PROMPT_TOKENS)
    seconds = step_seconds(runner, [plan] * 10)
    print(f"{num_sequences} prompts of {NUM_PROMPT_TOKENS} tokens: {1e3 * seconds:.1f} ms of CPU time")


def print_profile(runner: ModelRunner, num_sequences: int, context: int, block_size: int, num_rows: int) -> None:
    plans = [plan_of(num_sequences, context + step, block_size) for step in range(2 * NUM_STEPS + 5)]
    plan = plans[NUM_STEPS + 5]
    seconds = step_seconds(runner, plans[: NUM_STEPS + 5])
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for later in plans[NUM_STEPS + 5 :]:
            runner.run(later)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"\n{len(plan.rows)} sequences, context {plan.rows[0].end}: {1e3 * seconds:.1f} ms of CPU time a step\n")
    shares = dict.fromkeys((*KINDS, "everything else"), 0.0)
    for event in events:
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), "everything else")
        shares[kind] += event.self_cpu_time_total
    for kind, share in shares.items():
        print(f"  {100 * share / total:5.1f} %  {kind}")
    print(f"\n  {'operator':48} {'calls a step':>12} {'us a call':>10} {'share':>8}")
    for event in events[:num_rows]:
        per_call = event.self_cpu_time_total / event.count
        share = 100 * event.self_cpu_time_total / total
        print(f"  {event.key[:48]:48} {event.count / NUM_STEPS:12.0f} {per_call:10.1f} {share:6.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a text checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--weight-dtype", choices=["int8"])
    parser.add_argument("--torch", action="store_true", help="without our own kernels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=160, help="tokens of each sequence")
    parser.add_argument("--rows", type=int, default=14, help="operators to list")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = read_model_config(args.model)
    engine = EngineConfig()
    model = load_language_model(args.model, config, dtype=args.dtype)
    kernels = try_kernels() if can_use_kernels(model) and not args.torch else None
    if kernels is not None:
        kernels = seen_by_profiler(kernels)
    runner = ModelRunner(prepare_for_decoding(model, weight_dtype=args.weight_dtype, kernels=kernels), engine)
    weights = args.weight_dtype or args.dtype
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, {weights} weights, {args.model.name}, "
        f"{'torch alone' if kernels is None else 'our kernels'}"
    )
    print()
    for num_sequences in (1, 4):
        print_prompt(runner, num_sequences, engine.block_size)
    for num_sequences in (1, 4, 16):
        print_profile(runner, num_sequences, args.context, engine.block_size, args.rows)


if __name__ == "__main__":
    main()
