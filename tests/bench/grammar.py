"""What structured output costs a step, and a request before its first one.

    python tests/bench/grammar.py --model FOLDER [--dtype bfloat16] [--tokens 48]

Steps the engine by hand, with batches of 1, 4 and 16 answers of which none, half or all have a form. The share is the
time spent in following grammars, in their masks and in applying these to the scores, over the time of the steps in the
same run; the whole step is printed as well, though what else runs on the machine shows in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from bench_prompts import PromptMaker

from omnilmm.config import EngineConfig
from omnilmm.engine import sampling
from omnilmm.engine.engine import Engine, Tokens
from omnilmm.engine.grammar import GrammarCompiler, Matcher
from omnilmm.engine.runner import ModelRunner
from omnilmm.messages import GenerateCall, Grammar, GrammarKind, Prompt, Sampling
from omnilmm.models.config import read_model_config
from omnilmm.models.packed import load_for_decoding
from omnilmm.prompt.tokens import load_tokenizer

BATCHES = (1, 4, 16)
ZIP = {"type": "string", "pattern": "^[0-9]{5}$"}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "role": {"enum": ["author", "editor", "reader"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "address": {"type": "object", "properties": {"city": {"type": "string"}, "zip": ZIP}, "required": ["city"]},
    },
    "required": ["name", "age", "email", "role", "tags", "address"],
    "additionalProperties": False,
}  # fmt: skip
FORMS = {
    "json_object": Grammar(GrammarKind.JSON_OBJECT),
    "person": Grammar(GrammarKind.JSON_SCHEMA, json.dumps(PERSON)),
    "anything long": Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"type": "array", "items": {}, "minItems": 1000})),
}


class Stopwatch:
    """Seconds spent inside some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def around(self, owner: object, *names: str) -> Iterator[None]:
        originals = {name: getattr(owner, name) for name in names}
        for name, original in originals.items():
            setattr(owner, name, self._timed(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(owner, name, original)

    def _timed(self, function: Callable) -> Callable:
        def timed(*args: object, **kwargs: object) -> object:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun

        return timed


def run(
    engine: Engine, compiler: GrammarCompiler, prompts: list, forms: list[Grammar | None], options: argparse.Namespace
) -> tuple[list[float], float]:
    """Seconds of every decode step, and how many of them all went into grammars."""
    for prompt, form in zip(prompts, forms, strict=True):
        wish = Sampling(options.tokens, grammar=form, stop_ids=() if form is None else (options.eos_id,))
        matcher = None if form is None else compiler.start(form, stop_ids=wish.stop_ids)
        engine.submit(GenerateCall("bench", Prompt(prompt.ids, (), ()), (), wish), matcher=matcher)
    watch, steps = Stopwatch(), []
    with watch.around(Matcher, "advance", "mask"), watch.around(sampling, "_adjust"):
        while engine.has_work:
            begun, spent = time.perf_counter(), watch.seconds
            outputs = engine.step()
            if any(isinstance(output, Tokens) and output.batch.prefill for output in outputs):
                watch.seconds = spent  # a prefill: not what is measured
                continue
            steps.append(time.perf_counter() - begun)
    return steps, watch.seconds


def print_starts(compiler: GrammarCompiler, stop_ids: tuple[int, ...]) -> None:
    print("\nseconds until a grammar can be followed: its first use, and later ones")
    for name, form in FORMS.items():
        seconds = []
        for _ in range(11):
            begun = time.perf_counter()
            compiler.start(form, stop_ids=stop_ids)
            seconds.append(time.perf_counter() - begun)
        print(f"  {name:16}{seconds[0]:10.4f}{statistics.median(seconds[1:]):12.6f}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a text checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    config, tokenizer = read_model_config(options.model), load_tokenizer(options.model)
    options.eos_id = tokenizer.eos_id
    begun = time.perf_counter()
    compiler = GrammarCompiler(tokenizer, vocab_size=config.language.vocab_size)
    print(f"vocabulary of {config.language.vocab_size}, prepared in {time.perf_counter() - begun:.3f} s")
    print_starts(compiler, (options.eos_id,))
    model = load_for_decoding(options.model, config, dtype=options.dtype)
    room = EngineConfig(max_context=min(config.max_context, 2048), max_sequences=16)
    maker = PromptMaker(options.model, num_tokens=64)
    print(f"\n{options.dtype}, {options.tokens} tokens each, greedy; {torch.get_num_threads()} threads")
    print(f"{'batch':>5}  {'form':16}{'step, ms':>10}{'grammar, ms':>13}{'share':>8}")
    run(Engine(ModelRunner(model, room), room), compiler, maker.make(1, seed=99), [None], options)  # not counted
    for size in BATCHES:
        mixes: dict[str, list[Grammar | None]] = {"none": [None] * size}
        mixes |= {name: [form] * size for name, form in FORMS.items()}
        if size > 1:
            mixes["half json_object"] = [FORMS["json_object"], None] * (size // 2)
        for seed, (name, forms) in enumerate(mixes.items()):
            engine = Engine(ModelRunner(model, room), room)
            steps, spent = run(engine, compiler, maker.make(size, seed=100 * size + seed), forms, options)
            mean = sum(steps) / len(steps)
            grammar = spent / len(steps)
            print(f"{size:>5}  {name:16}{1000 * mean:10.2f}{1000 * grammar:13.3f}{100 * grammar / mean:7.1f}%")


if __name__ == "__main__":
    main()
