"""Batches of tokens to what a client reads of them: text, and log-probabilities beside it."""

from __future__ import annotations

from collections.abc import Sequence

from omnilmm.messages import Delta, FinishReason, TextLogprob, TokenBatch, TokenLogprob
from omnilmm.prompt.detokenize import Detokenizer, token_text
from omnilmm.prompt.template import Template


class Speller:
    """Spells one answer: whole characters, stop strings cut, log-probabilities kept beside their text.

    `finish` is why the answer is over, None while it goes on: a stop string ends it before the decoder does.

    Raises:
        InvalidRequest: a stop string is empty.
    """

    def __init__(self, template: Template, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer = template.tokenizer
        self._text = Detokenizer(template.tokenizer, skip_special=template.skip_special, stop=stop)
        self._held: list[TextLogprob] = []
        self.finish: FinishReason | None = None

    def push(self, batch: TokenBatch) -> Delta | None:
        """What the batch makes certain, None if that is nothing. An id that ended the answer is not shown."""
        shown = batch.ids[:-1] if batch.finish is FinishReason.STOP else batch.ids
        text = self._text.push(shown)
        self._held += [self._describe(i, p) for i, p in zip(shown, batch.logprobs, strict=False)]
        self.finish = FinishReason.STOP if self._text.stopped else batch.finish
        if self.finish is not None and not self._text.stopped:
            text += self._text.flush()
        if not text and not (self._held and self.finish is not None):
            return None
        logprobs, self._held = tuple(self._held), []
        return Delta(text, logprobs)

    def _describe(self, token_id: int, logprob: TokenLogprob) -> TextLogprob:
        top = tuple((*token_text(self._tokenizer, i), value) for i, value in logprob.top)
        return TextLogprob(*token_text(self._tokenizer, token_id), logprob.logprob, top)
