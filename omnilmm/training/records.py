"""Conversations with pictures from JSONL files, in the original's format::

    {"id": "0", "image": "cat.jpg", "conversations": [{"role": "user", "content": "What is this?"},
                                                      {"role": "assistant", "content": "A cat."}]}

`image` may be left out or be a list. ``<image>`` in a user's content says which message a picture belongs to: each
takes the next picture of the list, and a newline right behind it goes with it. Without any, all pictures belong to the
first user message. Where the pictures stand within a message is the template's rule: in front of its words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnilmm.errors import ConfigError
from omnilmm.messages import Conversation, ImagePart, TextPart, Turn

PLACEHOLDER = re.compile(r"<image>\n?")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Record:
    """One line: the conversation, in which picture parts hold no bytes yet, and the picture files in order."""

    name: str
    conversation: Conversation
    pictures: tuple[Path, ...]


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file, in order; empty lines are passed over.

    Raises:
        ConfigError: the file is missing, or a line is not a record. The message names the file and the line.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _record(line, path, f"{path.name}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} cannot be read.") from error


def _record(line: str, path: Path, at: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError:
        raise ConfigError(f"{at} is not JSON.") from None
    if not isinstance(value, dict) or not isinstance(value.get("conversations"), list):
        raise ConfigError(f"{at} is not an object with conversations.")
    images = value.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ConfigError(f"{at}: image is neither a path nor a list of them.")
    messages = [_message(message, at) for message in value["conversations"]]
    pictures = tuple(path.parent / image for image in images)
    return Record(str(value.get("id", at)), Conversation(_turns(messages, len(pictures), at)), pictures)


def _message(value: Any, at: str) -> tuple[Any, str]:
    if isinstance(value, Mapping) and value.get("role") in ROLES and isinstance(value.get("content"), str):
        return value["role"], value["content"]
    raise ConfigError(f"{at}: a message is not a role (user, assistant, system) with content.")


def _turns(messages: list[tuple[Any, str]], num_pictures: int, at: str) -> tuple[Turn, ...]:
    """The messages with their pictures."""
    placed = [len(PLACEHOLDER.findall(content)) if role == "user" else 0 for role, content in messages]
    if not any(placed):
        first = next((index for index, (role, _) in enumerate(messages) if role == "user"), None)
        if first is None:
            raise ConfigError(f"{at} has no user message.")
        placed[first] = num_pictures
    elif sum(placed) != num_pictures:
        raise ConfigError(f"{at} has {num_pictures} pictures and {sum(placed)} places for them.")
    turns = []
    for (role, content), count in zip(messages, placed, strict=True):
        words = PLACEHOLDER.sub("", content) if role == "user" else content
        parts = tuple(ImagePart(b"", "conversations") for _ in range(count))
        turns.append(Turn(role, (*parts, TextPart(words))))
    return tuple(turns)
