"""Chat formats of plain text models. A checkpoint's Jinja template is compared with the ones we know, never executed.

chatml    ``<|im_start|>role`` newline text ``<|im_end|>`` newline; some put a system message of their own in front of
          conversations that have none (SmolLM2, Qwen)
zephyr    ``<|role|>`` newline text EOS newline, the template of zephyr-7b-beta, which OmniLMM-12B uses too
minicpm   ``<用户>`` text ``<AI>`` text, stripped, as in MiniCPM-2B
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from omnilmm.errors import CheckpointError
from omnilmm.messages import Turn
from omnilmm.prompt.segments import Control, Segment, Words
from omnilmm.prompt.vocabulary import Vocabulary

ZEPHYR_MARKS = ("<|system|>", "<|user|>", "<|assistant|>")
MINICPM_MARKS = ("<用户>", "<AI>")

Render = Callable[[tuple[Turn, ...]], Iterator[Segment]]


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How turns become segments; `marks` are role marks made of ordinary text, `end` ends an answer."""

    render: Render
    marks: tuple[str, ...]
    end: str


def recognise(vocabulary: Vocabulary) -> ChatFormat:
    """The format of the checkpoint's chat template.

    Raises:
        CheckpointError: there is no template, it is not one we know, or its control tokens are missing.
    """
    source = vocabulary.chat_template
    if source is None:
        raise CheckpointError("The tokenizer files hold no chat template, so this is not a chat model.")
    template = _tidy(source)
    chatml = _CHATML.fullmatch(template)
    if chatml:
        for token in ("<|im_start|>", "<|im_end|>"):
            vocabulary.control_id(token)
        return ChatFormat(_chatml(chatml["system"]), marks=(), end="<|im_end|>")
    if template == _ZEPHYR:
        return ChatFormat(_zephyr(vocabulary.eos_text), ZEPHYR_MARKS, end=vocabulary.eos_text)
    if template == _MINICPM:
        return ChatFormat(_minicpm, MINICPM_MARKS, end=vocabulary.eos_text)
    raise CheckpointError("The chat template is not one of the known formats (ChatML, Zephyr, MiniCPM).")


def is_zephyr(vocabulary: Vocabulary) -> bool:
    """Whether the checkpoint's chat template, if it has one, is Zephyr's."""
    return vocabulary.chat_template is None or _tidy(vocabulary.chat_template) == _ZEPHYR


def zephyr_turn(role: str, eos: str, content: Iterable[Segment]) -> Iterator[Segment]:
    """One message of Zephyr's format."""
    yield Words(f"<|{role}|>\n")
    yield from content
    yield Control(eos)
    yield Words("\n")


def _chatml(default_system: str | None) -> Render:
    def message(role: str, text: Words) -> Iterator[Segment]:
        yield Control("<|im_start|>")
        yield Words(f"{role}\n")
        yield text
        yield Control("<|im_end|>")
        yield Words("\n")

    def render(turns: tuple[Turn, ...]) -> Iterator[Segment]:
        if default_system is not None and turns[0].role != "system":
            yield from message("system", Words(default_system))
        for turn in turns:
            yield from message(turn.role, Words(turn.text, typed=True))
        yield Control("<|im_start|>")
        yield Words("assistant\n")

    return render


def _zephyr(eos: str) -> Render:
    def render(turns: tuple[Turn, ...]) -> Iterator[Segment]:
        for turn in turns:
            yield from zephyr_turn(turn.role, eos, [Words(turn.text, typed=True)])
        yield Words("<|assistant|>\n")

    return render


def _minicpm(turns: tuple[Turn, ...]) -> Iterator[Segment]:
    for turn in turns:
        text = Words(turn.text.strip(), typed=True)
        yield from (Words("<用户>"), text, Words("<AI>")) if turn.role == "user" else (text,)


def _tidy(template: str) -> str:
    """The template with insignificant differences removed: line ends, quotes, space inside the braces."""
    unescaped = template.replace("\r\n", "\n").replace("\\n", "\n").replace('"', "'").strip()
    return re.sub(r"(?<=\{[{%])[ ]+|[ ]+(?=[}%]\})", "", unescaped)


_ZEPHYR = _tidy(
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
_MINICPM = _tidy(
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{'<用户>' + message['content'].strip() + '<AI>'}}"
    "{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}"
)
_SYSTEM_HOLE = "THE DEFAULT SYSTEM MESSAGE"
_CHATML_SOURCES = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}",
    "{% for message in messages %}",
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + _SYSTEM_HOLE + "<|im_end|>\n' }}{% endif %}",
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
)  # the first and the third may be missing
_CHATML = re.compile(
    "(?:{})?{}(?:{})?{}".format(*(re.escape(_tidy(source)) for source in _CHATML_SOURCES)).replace(
        re.escape(_SYSTEM_HOLE), "(?P<system>[^'{}<]*)"
    )
)
