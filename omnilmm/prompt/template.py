"""From a conversation to a prompt: one small class per model family.

The rules, for every family:

- At most one system message, and it comes first. The next message and the last one are the user's. Several messages
  of one role in a row are allowed and stay separate turns.
- Pictures stand in user messages only. The pictures of a message go in front of its words, in their order, each
  followed by a newline: the layout both families were trained on. A conversation without pictures has no block.
- Nothing is ever cut off. The caller checks the length; `max_tokens` refuses hopeless prompts early.

`InputHandling.SAFE`: text that a client sends never acts as a control token or a role mark, whatever it spells; it
reaches the model as the words it is. Ordinary text gets the ids the originals give it. (U+2581, which SentencePiece
uses for the space, is read as a space.)

`InputHandling.ORIGINAL`: the originals bit for bit. Special tokens typed by a client are parsed as such. The originals
know one picture, in the first message; there their own rule of placement holds, elsewhere the one above. Where the
text, so parsed, has not as many blocks as there are pictures, the originals fail or bind the wrong vectors, and we
refuse the request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omnilmm.config import Family, InputHandling
from omnilmm.errors import CheckpointError, InvalidRequest
from omnilmm.messages import Conversation, Prompt, Span, TextPart, Turn
from omnilmm.prompt.formats import MINICPM_MARKS, ZEPHYR_MARKS, is_zephyr, recognise, zephyr_turn
from omnilmm.prompt.segments import Block, ForgeryProof, Segment, Words, check_fits, find_spans, text_of, too_long
from omnilmm.prompt.tokens import load_tokenizer, naming
from omnilmm.prompt.vocabulary import Vocabulary

NUM_IMAGE_TOKENS = 64
IMAGE_PLACEHOLDER = "<image>"
"""Where OmniLMM-12B's users say that the picture belongs."""

OMNILMM_SYSTEM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, and polite answers to the human's "
    "questions."
)
"""The system message OmniLMM-12B was tuned with (omnilmm/utils.py and chat.py of the original)."""


@dataclass(frozen=True, slots=True)
class BeamDefaults:
    """The original's settings when sampling is switched off; the penalty acts on log-probabilities."""

    num_beams: int
    repetition_penalty: float


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the original passes to `generate` when it samples; `top_k` 0 and `top_p` 1.0 mean off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int = 1024
    beams: BeamDefaults | None = None


def load_template(family: Family, folder: Path, *, num_image_tokens: int = NUM_IMAGE_TOKENS) -> Template:
    """The template of the checkpoint in `folder`, with its tokenizer.

    Raises:
        CheckpointError: a tokenizer file cannot be used, or the chat format is unknown.
    """
    tokenizer = load_tokenizer(folder)
    with naming(folder):
        return make_template(family, tokenizer, num_image_tokens=num_image_tokens)


def make_template(family: Family, tokenizer: Vocabulary, *, num_image_tokens: int = NUM_IMAGE_TOKENS) -> Template:
    """The template of `family` over a loaded tokenizer; `num_image_tokens` positions stand for one picture.

    Raises:
        CheckpointError: the tokenizer lacks tokens the family needs, or the chat format is unknown.
    """
    match family:
        case Family.OMNILMM_12B:
            return OmniLMM12BTemplate(tokenizer, num_image_tokens)
        case Family.OMNILMM_3B:
            return MiniCPMVTemplate(tokenizer, num_image_tokens)
        case Family.TEXT:
            return TextTemplate(tokenizer)


class Template(ABC):
    """Turns conversations into prompts for one model.

    `defaults` are the family's sampling settings, `eos_ids` the ids that end an answer. `skip_special` says whether
    the family's original leaves control tokens out of the answer's text (`Detokenizer`).
    """

    defaults: SamplingDefaults
    skip_special = True

    def __init__(self, tokenizer: Vocabulary, *, marks: tuple[str, ...], block: Block | None, end: str) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = tuple(dict.fromkeys((tokenizer.eos_id, tokenizer.control_id(end))))
        self._proof = ForgeryProof(tokenizer, marks)
        self._block = block
        for token in (block.start, block.patch, block.end) if block else ():
            tokenizer.control_id(token)

    def render(self, conversation: Conversation, handling: InputHandling, *, max_tokens: int | None = None) -> Prompt:
        """The ids of `conversation`, its picture spans in order, and the ids the repetition penalty starts from.

        Args:
            conversation: what the client sent.
            handling: SAFE or ORIGINAL, see the module's docstring.
            max_tokens: refuse a longer prompt, without encoding it where its length in bytes decides.

        Raises:
            InvalidRequest: the turns break the rules, a text holds a lone surrogate, or (ORIGINAL) the typed text
                makes other places for pictures than there are pictures.
            ContextLengthExceeded: the prompt is longer than `max_tokens`.
        """
        segments = self._checked_segments(conversation, handling)
        check_fits(self.tokenizer, text_of(segments), max_tokens)
        if handling is InputHandling.ORIGINAL:
            ids, spans = self._parse(segments, len(conversation.images))
            if max_tokens is not None and len(ids) > max_tokens:
                raise too_long(max_tokens)
        else:
            ids, spans = self._proof.encode(segments, max_tokens=max_tokens)
        assert len(spans) == len(conversation.images)
        return Prompt(tuple(ids), spans, self._penalty_ids(ids))

    def text(self, conversation: Conversation, handling: InputHandling) -> str:
        """The prompt as text without BOS, with control tokens written out.

        Raises:
            InvalidRequest: as in `render`, but for the places of pictures.
        """
        return text_of(self._checked_segments(conversation, handling))

    def _checked_segments(self, conversation: Conversation, handling: InputHandling) -> tuple[Segment, ...]:
        _check_turns(conversation)
        return tuple(self._segments(conversation, handling))

    def _parse(self, segments: tuple[Segment, ...], num_images: int) -> tuple[list[int], tuple[Span, ...]]:
        leading = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        ids = leading + self.tokenizer.encode_parsed(text_of(segments))
        spans = find_spans(self.tokenizer, self._block, ids) if self._block else ()
        if spans is None or len(spans) != num_images:
            raise InvalidRequest("The text makes other places for pictures than there are pictures.", param="messages")
        return ids, spans

    @abstractmethod
    def _segments(self, conversation: Conversation, handling: InputHandling) -> Iterator[Segment]:
        """The prompt without BOS."""

    @abstractmethod
    def _penalty_ids(self, ids: list[int]) -> tuple[int, ...]: ...


class _PictureTemplate(Template):
    """What the two picture families share. Both were trained with BOS, and generate from embeddings: `generate`
    then begins with a lone BOS id, so that is all the repetition penalty has seen."""

    _block: Block

    def __init__(self, tokenizer: Vocabulary, *, marks: tuple[str, ...], block: Block) -> None:
        super().__init__(tokenizer, marks=marks, block=block, end=tokenizer.eos_text)
        if not tokenizer.adds_bos:
            raise CheckpointError("The tokenizer does not put BOS in front, which this family needs.")

    def _penalty_ids(self, ids: list[int]) -> tuple[int, ...]:
        return (self.tokenizer.bos_id,)

    def _blocks(self, turn: Turn) -> Iterator[Segment]:
        for _ in turn.images:
            yield self._block
            yield Words("\n")


class OmniLMM12BTemplate(_PictureTemplate):
    """OmniLMM-12B: Zephyr's chat format with the system message it was tuned with.

    A client's system message takes the place of the fixed one. ``<image>`` in the first user message says where its
    picture belongs:

    - ORIGINAL: every occurrence is replaced by a block; without one, a block and a newline go in front.
    - SAFE: at the very start of its first text part it stands for the message's pictures, and the newline behind
      the last of them is the user's to type; anywhere else it is text.
    """

    defaults = SamplingDefaults(temperature=0.6, top_k=30, top_p=0.9, repetition_penalty=1.1)

    def __init__(self, tokenizer: Vocabulary, num_image_tokens: int = NUM_IMAGE_TOKENS) -> None:
        block = Block("<im_start>", "<im_patch>", "<im_end>", num_image_tokens)
        super().__init__(tokenizer, marks=ZEPHYR_MARKS, block=block)
        if not is_zephyr(tokenizer):
            raise CheckpointError("The chat template is not Zephyr's, which OmniLMM-12B was tuned with.")

    def _segments(self, conversation: Conversation, handling: InputHandling) -> Iterator[Segment]:
        eos = self.tokenizer.eos_text
        turns = conversation.turns
        if turns[0].role != "system":
            yield from zephyr_turn("system", eos, [Words(OMNILMM_SYSTEM)])
        first = next(turn for turn in turns if turn.role == "user")
        for turn in turns:
            if turn is first and turn.images:
                content = self._first(turn, handling, is_lone=len(conversation.images) == 1)
            else:
                content = iter((*self._blocks(turn), Words(turn.text, typed=True)))
            yield from zephyr_turn(turn.role, eos, content)
        yield Words("<|assistant|>\n")

    def _first(self, turn: Turn, handling: InputHandling, *, is_lone: bool) -> Iterator[Segment]:
        """A first user message with pictures. `is_lone`: the conversation has one, as the original's always do."""
        text = turn.text
        first_part = next((part.text for part in turn.parts if isinstance(part, TextPart)), "")
        blocks = tuple(self._blocks(turn))
        if handling is InputHandling.ORIGINAL and is_lone and IMAGE_PLACEHOLDER in text:
            *heads, text = text.split(IMAGE_PLACEHOLDER)
            blocks = tuple(segment for head in heads for segment in (Words(head, typed=True), self._block))
        elif first_part.startswith(IMAGE_PLACEHOLDER):
            text = text.removeprefix(IMAGE_PLACEHOLDER)
            blocks = blocks[:-1]
        yield from blocks
        yield Words(text, typed=True)


class MiniCPMVTemplate(_PictureTemplate):
    """OmniLMM-3B (MiniCPM-V 1.0): ``<用户>`` and ``<AI>`` in front of messages, nothing behind them.

    There is no system role. A client's system message goes in front of the words of the first user message, behind
    the pictures, followed by a newline. Patches are written ``<unk>``. Answers show ``<ref>``, ``<box>`` and the like.
    """

    skip_special = False

    defaults = SamplingDefaults(
        temperature=0.7, top_k=100, top_p=0.8, beams=BeamDefaults(num_beams=3, repetition_penalty=1.2)
    )

    def __init__(self, tokenizer: Vocabulary, num_image_tokens: int = NUM_IMAGE_TOKENS) -> None:
        block = Block("<image>", "<unk>", "</image>", num_image_tokens)
        super().__init__(tokenizer, marks=MINICPM_MARKS, block=block)

    def _segments(self, conversation: Conversation, handling: InputHandling) -> Iterator[Segment]:
        turns = conversation.turns
        system = f"{turns[0].text}\n" if turns[0].role == "system" else ""
        for turn in turns[1:] if system else turns:
            yield Words("<AI>" if turn.role == "assistant" else "<用户>")
            yield from self._blocks(turn)
            yield Words(system + turn.text, typed=True)
            system = ""
        yield Words("<AI>")


class TextTemplate(Template):
    """A plain text model, in the chat format its tokenizer files ask for."""

    defaults = SamplingDefaults()

    def __init__(self, tokenizer: Vocabulary) -> None:
        self._format = recognise(tokenizer)
        super().__init__(tokenizer, marks=self._format.marks, block=None, end=self._format.end)

    def _segments(self, conversation: Conversation, handling: InputHandling) -> Iterator[Segment]:
        if conversation.images:
            raise InvalidRequest("This model takes no pictures.", param=conversation.images[0].param)
        return self._format.render(conversation.turns)

    def _penalty_ids(self, ids: list[int]) -> tuple[int, ...]:
        return tuple(ids)


def _check_turns(conversation: Conversation) -> None:
    """The rules on roles and texts that hold for every family."""
    turns = conversation.turns
    if not turns:
        raise InvalidRequest("There must be at least one message.", param="messages")
    for i, turn in enumerate(turns):
        if turn.role == "system" and i > 0:
            raise InvalidRequest("A system message may only come first.", param=f"messages[{i}].role")
        if turn.images and turn.role != "user":
            raise InvalidRequest("Only user messages may hold pictures.", param=f"messages[{i}].content")
        try:
            turn.text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("The text holds a lone surrogate.", param=f"messages[{i}].content") from None
    first = min(1 if turns[0].role == "system" else 0, len(turns) - 1)
    if turns[first].role != "user":
        raise InvalidRequest("The conversation must begin with the user.", param=f"messages[{first}].role")
    if turns[-1].role != "user":
        raise InvalidRequest("The last message must be the user's.", param=f"messages[{len(turns) - 1}].role")
