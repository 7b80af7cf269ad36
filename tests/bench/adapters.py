"""What adapters cost a decode step: `python tests/bench/adapters.py --model FOLDER`.

Steps of 16 sequences through the engine's own runner, over the model alone and with adapters of rank 16 on every
projection: one for all, and 8 mixed, two sequences each. All kinds of steps take turns; medians of wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from profile_step import plan_of

from omnilmm.config import EngineConfig
from omnilmm.engine.plan import Plan
from omnilmm.engine.runner import ModelRunner
from omnilmm.models.adapter_files import AdapterWeights, projection_slots
from omnilmm.models.adapters import AdapterPool
from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.packed import load_for_decoding

NUM_SEQUENCES, NUM_ADAPTERS = 16, 8


def random_adapter(config: ModelConfig, rank: int, dtype: torch.dtype) -> AdapterWeights:
    pairs = {
        name: (torch.randn(rank, slot.shape[1], dtype=dtype) / 24, torch.randn(rank, slot.shape[0], dtype=dtype) / 99)
        for name, slot in projection_slots(config).items()
    }
    return AdapterWeights("", rank, pairs)


def with_adapters(plan: Plan, rank: int, num_adapters: int) -> Plan:
    """The plan's sequences with so many adapters in turn; 0 leaves it as it is."""
    if not num_adapters:
        return plan
    firsts = [rank * (index % num_adapters) for index in range(len(plan.rows))]
    rows = [replace(row, ranks=range(first, first + rank)) for row, first in zip(plan.rows, firsts, strict=True)]
    return Plan(tuple(rows))


def medians(runner: ModelRunner, plans: Mapping[str, Plan], num_steps: int) -> dict[str, float]:
    """Seconds a step, by kind."""
    seconds: dict[str, list[float]] = {kind: [] for kind in plans}
    for step in range(num_steps + 3):
        for kind, plan in plans.items():
            begun = time.perf_counter()
            runner.run(plan)
            if step >= 3:
                seconds[kind].append(time.perf_counter() - begun)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--weight-dtype", choices=["int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=160, help="tokens of each sequence")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = read_model_config(args.model)
    model = load_for_decoding(args.model, config, dtype=args.dtype, weight_dtype=args.weight_dtype)
    pool = AdapterPool(model, config, num_ranks=NUM_ADAPTERS * args.rank)
    for index in range(NUM_ADAPTERS):
        weights = random_adapter(config, args.rank, pool.dtype)
        pool.write(range(index * args.rank, (index + 1) * args.rank), weights)
    engine = EngineConfig()
    runner = ModelRunner(model, engine, adapters=pool)
    base = plan_of(NUM_SEQUENCES, args.context, engine.block_size)
    kinds = {"no adapter": 0, "one adapter": 1, f"{NUM_ADAPTERS} adapters": NUM_ADAPTERS}
    plans = {kind: with_adapters(base, args.rank, count) for kind, count in kinds.items()}
    seconds = medians(runner, plans, args.steps)
    weights_name = args.weight_dtype or args.dtype
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, {weights_name} weights, {args.model.name}")
    print(f"{NUM_SEQUENCES} sequences, context {args.context}, rank {args.rank}, pool {pool.num_bytes / 1e6:.0f} MB")
    for kind, value in seconds.items():
        print(f"  {kind:12} {1e3 * value:7.1f} ms a step   x{value / seconds['no adapter']:.2f}")


if __name__ == "__main__":
    main()
