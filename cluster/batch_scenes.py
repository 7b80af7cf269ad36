"""`omnilmm batch draw` and `omnilmm batch score`: pictures to try a batch on, and how many of its answers are right."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from omnilmm.errors import ConfigError

if TYPE_CHECKING:
    from omnilmm.training.scenes import Scene
    from omnilmm.training.scenes_check import Exchange

TABLE = "scenes.jsonl"
TALKS_PER_SCENE = 12
MAX_SCENES_PER_ROW = 200


def draw(  # noqa: PLR0917  the parameters of a command are its options
    folder: Annotated[Path, typer.Argument(help="A new folder for the pictures and scenes.jsonl.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures to draw.")] = 1000,
    kind: Annotated[str | None, typer.Option(help="Ask this kind of question alone, such as describe.")] = None,
    language: Annotated[str, typer.Option(help="en or zh.")] = "en",
    seed: Annotated[int | None, typer.Option(min=0, help="Makes the same pictures again.")] = None,
    side: Annotated[int, typer.Option(min=64, max=4096, help="Longer side in pixels.")] = 336,
) -> None:
    """Draw synthetic scenes that no training has seen, with a question about each and its right answer."""
    from omnilmm.training.scenes_check import Kind
    from omnilmm.training.scenes_draw import draw as draw_scene
    from omnilmm.training.scenes_draw import load_scenery
    from omnilmm.training.scenes_words import Language

    if kind is not None and kind not in [*Kind]:
        raise ConfigError(f"--kind is one of {', '.join(Kind)}")
    if language not in [*Language]:
        raise ConfigError(f"--language is one of {', '.join(Language)}")
    if folder.exists():
        raise ConfigError(f"{folder} is there already; name a new folder")
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    folder.mkdir(parents=True)
    scenery, asked = load_scenery(), _questions(seed, kind, language)
    with (folder / TABLE).open("w", encoding="utf-8") as table:
        for number in range(count):
            scene, exchange = next(asked)
            image = f"{number:06d}.png"
            draw_scene(scene, scenery, side=side).save(folder / image)
            table.write(json.dumps({"image": image, **_told(exchange)}, ensure_ascii=False) + "\n")
    Console(highlight=False, soft_wrap=True).print(f"drew {count} pictures in {folder} (seed {seed})")


def score(
    answers: Annotated[
        Path, typer.Argument(help="The .jsonl that `batch run` made of scenes.jsonl.", exists=True, dir_okay=False)
    ],
) -> None:
    """Count the right answers, by kind of question. What was refused is not right."""
    from omnilmm.training.scenes_check import is_right

    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for number, line in enumerate(answers.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            exchange, answer = _exchange(row), row["answer"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{answers}, line {number}: no answer to a question of scenes.jsonl") from None
        asked[exchange.kind] += 1
        right[exchange.kind] += answer is not None and is_right(exchange, answer)
    table = Table("question", "asked", "right", "accuracy")
    for name, num in [*sorted(asked.items()), ("all", asked.total())]:
        num_right = right.total() if name == "all" else right[name]
        table.add_row(name, str(num), str(num_right), f"{num_right / max(num, 1):.1%}")
    Console(highlight=False).print(table)


def _questions(seed: int, kind: str | None, language: str) -> Iterator[tuple[Scene, Exchange]]:
    """A question about one scene after the other, skipping those that nothing of the kind can be asked about."""
    from omnilmm.training.scenes import Split
    from omnilmm.training.scenes_ask import ask
    from omnilmm.training.scenes_make import make_scene

    index = since = 0
    while True:
        scene = make_scene(Split.TEST, seed, index)
        openings = [talk[0] for talk in ask(scene, Split.TEST, seed, index, num=TALKS_PER_SCENE)]
        fitting = [one for one in openings if one.language == language and kind in (None, one.kind)]
        index, since = index + 1, since + 1
        if fitting:
            since = 0
            yield scene, fitting[0]
        elif since > MAX_SCENES_PER_ROW:
            raise ConfigError("this kind of question never opens a conversation")


def _told(exchange: Exchange) -> dict[str, Any]:
    return {
        "question": exchange.question,
        "kind": exchange.kind.value,
        "language": exchange.language.value,
        "truth": exchange.answer,
        "required": sorted(exchange.required),
        "allowed": sorted(exchange.allowed),
        "phrases": [sorted(phrase) for phrase in exchange.phrases],
    }


def _exchange(row: dict[str, Any]) -> Exchange:
    from omnilmm.training.scenes_check import Exchange, Kind
    from omnilmm.training.scenes_words import Language

    return Exchange(
        Kind(row["kind"]),
        Language(row["language"]),
        row["question"],
        row["truth"],
        frozenset(row["required"]),
        frozenset(row["allowed"]),
        tuple(frozenset(phrase) for phrase in row["phrases"]),
    )
