"""Words the prompt tests share: conversations, the reference checkpoints, and what a prompt must look like."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import sentencepiece
from hypothesis import settings
from hypothesis import strategies as st

from omnilmm.messages import Conversation, ImagePart, TextPart, Turn

DATA = Path(__file__).parents[1] / "data"
OMNI, MINICPM = DATA / "omnilmm-12b-tiny", DATA / "minicpm-v-tiny"

CONTROL_STRINGS = (
    *("<image>", "</image>", "<im_start>", "<im_patch>", "<im_end>", "</s>", "<s>", "<unk>", "<box>", "</ref>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "\n<|user|>\n", "</s>\n<|assistant|>\n", "<用户>", "<AI>"),
    *("＜｜user｜＞", "<im_start>" + "<im_patch>" * 64 + "<im_end>", "<image>" + "<unk>" * 64 + "</image>"),
    *("<|im_start|>", "<|im_end|>", "<|im_start|>system\n", "<|endoftext|>"),
)
HALVES = (
    "<",
    ">",
    "|>",
    "<|",
    "<im_",
    "start>",
    "<|us",
    "er|>",
    "<A",
    "I>",
    "<用",
    "户>",
    "</",
    "s>",
    " ",
    "\n",
    "user",
    "AI",
)

quick = settings(deadline=None, derandomize=True, max_examples=150)
plain_text = st.text(st.characters(codec="utf-8", exclude_characters="▁<＜"), max_size=30)
hostile_text = st.lists(
    st.one_of(st.sampled_from(CONTROL_STRINGS), st.sampled_from(HALVES), plain_text), max_size=8
).map("".join)


def turn(role: str, *parts: str | int) -> Turn:
    """A message; a number stands for so many pictures."""
    content: list[TextPart | ImagePart] = []
    for part in parts:
        content += [TextPart(part)] if isinstance(part, str) else [ImagePart(b"", "messages[0].content[0]")] * part
    return Turn(role, tuple(content))  # type: ignore[arg-type]


def user(*parts: str | int) -> Conversation:
    """A conversation of one user message."""
    return Conversation((turn("user", *parts),))


def goldens(folder: Path) -> dict:
    return json.loads((folder / "goldens.json").read_text(encoding="utf-8"))


def golden_conversation(messages: list[dict[str, str]]) -> Conversation:
    """The originals' input: text messages and one picture, which belongs to the first."""
    return Conversation(tuple(turn(m["role"], *([1] if i == 0 else []), m["content"]) for i, m in enumerate(messages)))


def written(tokenizer, ids: Iterable[int]) -> list[str | int]:
    """A prompt as its control ids and the texts between them, each without the dummy space in front."""
    items: list[str | int] = []
    for is_control, run in groupby(ids, key=tokenizer.control_ids.__contains__):
        if is_control:
            items += run
        else:
            text = b"".join(map(tokenizer.token_bytes, run)).decode()
            items.append(text.removeprefix(" ") if tokenizer.drops_first_space else text)
    return items


def joined(items: Iterable[str | int]) -> list[str | int]:
    """The same with neighbouring texts joined and empty ones left out."""
    result: list[str | int] = []
    for item in items:
        if isinstance(item, str) and result and isinstance(result[-1], str):
            result[-1] += item
        elif item != "":
            result.append(item)
    return result


def occurrences(ids: tuple[int, ...], wanted: tuple[int, ...]) -> Iterator[int]:
    return (at for at in range(len(ids)) if ids[at : at + len(wanted)] == wanted)


def ways_to_write(tokenizer, mark: str) -> set[tuple[int, ...]]:
    """Ids the tokenizer gives a role mark in several surroundings, with and without a dummy space joined to it."""
    ways = set()
    for before in ("", " ", "\n", "a", "。", "  ", "\n\n"):
        pieces = tokenizer.encode_text(before + mark + "\n")
        ways.add(tuple(p.id for p in pieces if p.end > len(before) and p.start < len(before + mark)))
    return ways


def train_sentencepiece(folder: Path, sentences: Iterable[str], **options: object) -> Path:
    """A small SentencePiece checkpoint in `folder`."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join([*sentences] * 3), encoding="utf-8")
    given = {"vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity", **options}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        remove_extra_whitespaces=False,
        minloglevel=2,
        hard_vocab_limit=False,
        **given,
    )
    set_config(folder, bos_token="<s>", eos_token="</s>")
    return folder


def set_config(folder: Path, **changes: object) -> None:
    """Change entries of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, **changes}), encoding="utf-8")


def make_metaspace(folder: Path, prepend_scheme: str, *, byte_pieces: bool = True) -> Path:
    """The 12B's pieces under the Metaspace rule that newer Llama checkpoints use."""
    layout = json.loads((OMNI / "tokenizer.json").read_text(encoding="utf-8"))
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend_scheme, "split": False}
    layout |= {"normalizer": None, "pre_tokenizer": space}
    if not byte_pieces:
        layout["model"]["vocab"] = {("x" * i if p == "<0x41>" else p): i for p, i in layout["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    config = json.loads((OMNI / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": False}), encoding="utf-8")
    return folder
