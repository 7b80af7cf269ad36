"""Greedy answers of a real checkpoint: ours, 16 at a time through the engine, against transformers, one by one.

    python tests/bench/greedy.py --model FOLDER

Float32 on both sides, the prompts' text through both tokenizers. Exit status 1 if an id differs. Where one does, the
two likeliest tokens of that position are printed: with a margin of rounding size, either is right.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_prompts import WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from omnilmm.config import EngineConfig
from omnilmm.messages import Embedding, GenerateCall, Prompt, Sampling
from omnilmm.pipeline import Pipeline

STARTS = (
    "The",
    "Why does the",
    "def",
    "In 1867, the",
    "She said that",
    "A recipe for",
    "12 + 30 =",
    "Once upon a time",
    "Il était une fois",
    "#include <",
)

Ids = tuple[int, ...]


def make_texts(count: int) -> list[str]:
    """Beginnings of text, 3 to 20 words long, the same at every run."""
    draw, words = random.Random(7), WORDS.split()
    return [" ".join((draw.choice(STARTS), *draw.choices(words, k=draw.randint(2, 16)))) for _ in range(count)]


async def our_answers(folder: Path, texts: Sequence[str], num_tokens: int) -> tuple[list[Ids], list[Ids]]:
    """Ids of the prompts, and of the answers."""
    engine = EngineConfig(max_sequences=16, max_waiting=2 * len(texts))  # one caller may take a part of the queue only
    async with Pipeline.load(str(folder), dtype="float32", engine=engine) as pipeline:
        prompts = [tuple(pipeline.card.template.tokenizer.encode_parsed(text)) for text in texts]

        async def answer(ids: Ids) -> Ids:
            call = GenerateCall("greedy", Prompt(ids, (), ()), (), Sampling(max_tokens=num_tokens))
            return tuple([i async for batch in pipeline.engine.generate(call, fetch=_no_vectors) for i in batch.ids])

        return prompts, list(await asyncio.gather(*map(answer, prompts)))


async def _no_vectors(key: str) -> Embedding | None:
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a text checkpoint")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=20, help="length of the answers")
    args = parser.parse_args()
    texts = make_texts(args.prompts)
    prompts, ours = asyncio.run(our_answers(args.model, texts, args.tokens))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    num_same = 0
    for text, prompt, answer in zip(texts, prompts, ours, strict=True):
        if tuple(tokenizer.encode(text)) != prompt:
            print(f"the tokenizers differ on {text!r}")
            continue
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=args.tokens, do_sample=False, pad_token_id=0)[0]
        theirs = tuple(whole[len(prompt) :].tolist())
        num_same += theirs == answer
        if theirs != answer:
            at = next(index for index, (a, b) in enumerate(zip(theirs, answer, strict=True)) if a != b)
            with torch.inference_mode():
                best = model(whole[None, : len(prompt) + at]).logits[0, -1].topk(2)
            margin = (best.values[0] - best.values[1]).item()
            print(f"{text!r}: token {at} is {answer[at]}, not {theirs[at]} (margin of the two best {margin:.2e})")
    lengths = sorted(map(len, prompts))
    print(f"prompts of {lengths[0]} to {lengths[-1]} tokens, {args.tokens} out, float32, transformers' SDPA attention")
    print(f"{num_same} of {len(texts)} answers have the same ids")
    sys.exit(num_same < len(texts))


if __name__ == "__main__":
    main()
