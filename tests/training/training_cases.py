"""Conversations, pictures and files for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from omnilmm.messages import Conversation, ImagePart, TextPart, Turn
from omnilmm.training.rows import Row, make_row
from omnilmm.training.sequences import SequenceMaker


def square(seed: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def talk(*texts: str, num_images: int = 1) -> Conversation:
    """User and assistant in turn; the pictures belong to the first message."""
    turns = []
    for number, text in enumerate(texts):
        pictures = tuple(ImagePart(b"", "p") for _ in range(num_images if number == 0 else 0))
        turns.append(Turn("assistant" if number % 2 else "user", (*pictures, TextPart(text))))
    return Conversation(tuple(turns))


def row_about(maker: SequenceMaker, picture: int, *talks: Conversation) -> Row:
    return make_row([s for conversation in talks for s in maker.sequences(conversation)], [square(picture)])


def write_jsonl(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
