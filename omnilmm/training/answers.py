"""Greedy answers for many questions at once: how training looks at what a model says.

It knows nothing of serving and shares only the models with it. (The engine's answers are the same; the tests compare.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from omnilmm.config import InputHandling
from omnilmm.messages import Conversation, Prompt
from omnilmm.models.attention import attention_sdpa
from omnilmm.prompt.detokenize import answer_text
from omnilmm.prompt.template import Template
from omnilmm.training.learner import Learner, moved
from omnilmm.training.rows import Batch, Row, collate


class Answers:
    """Answers of one learner as it is now."""

    def __init__(self, learner: Learner, template: Template, *, max_tokens: int = 64, batch: int = 32) -> None:
        self._learner, self._template, self._max_tokens, self._batch = learner, template, max_tokens, batch

    def answer(self, conversations: Sequence[Conversation], pictures: Sequence[Sequence[np.ndarray]]) -> list[str]:
        """One text per conversation, each with its own pictures, (side, side, 3) uint8."""
        was_training = self._learner.training
        self._learner.eval()
        prompts = [self._template.render(conversation, InputHandling.SAFE) for conversation in conversations]
        # Neighbours of like length waste least; the order of the answers does not change.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
        texts = dict.fromkeys(order, "")
        for start in range(0, len(order), self._batch):
            chosen = order[start : start + self._batch]
            rows = [_prompt_row(prompts[index], pictures[index]) for index in chosen]
            for index, ids in zip(chosen, self._generate(collate(rows)), strict=True):
                texts[index] = answer_text(self._template.tokenizer, ids, self._learner.config.family)
        self._learner.train(was_training)
        return [texts[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def _generate(self, batch: Batch) -> list[list[int]]:
        """Ids up to and without the end token, per row."""
        learner, ends = self._learner, self._template.eos_ids
        batch = moved(batch, learner.device)
        attend = _GrowingRows(batch, self._max_tokens, learner.config.language.num_layers)
        with learner.autocast():
            vectors = learner.encode(batch.squares) if len(batch.squares) else None
            hidden = learner.language(learner.embed(batch, vectors), batch.positions, attend)
            hidden = hidden.index_select(0, attend.last_tokens)
            texts: list[list[int]] = [[] for _ in range(len(attend.lengths))]
            done = [False] * len(texts)
            for step in range(self._max_tokens):
                ids = learner.language.logits(hidden).argmax(-1)  # (B,)
                for row, token in enumerate(ids.tolist()):
                    done[row] = done[row] or token in ends
                    if not done[row]:
                        texts[row].append(token)
                if all(done) or step == self._max_tokens - 1:
                    break
                attend.step = step
                hidden = learner.language(learner.language.embed(ids), attend.lengths + step, attend)
        return texts


def _prompt_row(prompt: Prompt, pictures: Sequence[np.ndarray]) -> Row:
    length = len(prompt.ids)
    return Row(
        ids=np.array(prompt.ids, np.int64),
        positions=np.arange(length),
        parents=np.arange(length) - 1,
        target_nodes=np.empty(0, np.int64),
        target_ids=np.empty(0, np.int64),
        spans=tuple((span.start, span.length, span.image) for span in prompt.spans),
        pictures=tuple(pictures),
    )


class _GrowingRows:
    """Keys and values of B prompts of different lengths, and of one more token per row and step."""

    def __init__(self, batch: Batch, max_tokens: int, num_layers: int) -> None:
        rows, _, self._longest, _ = batch.visible.shape
        row_of = batch.slots // self._longest
        self.lengths = torch.bincount(row_of, minlength=rows)  # (B,) tokens of each prompt
        self.last_tokens = self.lengths.cumsum(0) - 1
        self.step: int | None = None  # None while the prompts themselves run
        self._slots, self._visible, self._room = batch.slots, batch.visible, self._longest + max_tokens
        self._row_of, self._place_of = row_of, batch.slots % self._longest
        self._keys: list[Tensor | None] = [None] * num_layers  # (B, room, kv_heads, head_dim)
        self._values: list[Tensor | None] = [None] * num_layers

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)
        rows = len(self.lengths)
        if self.step is None:
            keys = v.new_zeros(rows, self._room, *k.shape[1:])
            values = torch.zeros_like(keys)
            self._keys[layer], self._values[layer] = keys, values
            where = (self._row_of, self._place_of)
            asked = q.new_zeros(rows, self._longest, *q.shape[1:])
            asked[where] = q
            keys[where], values[where] = k, v
            out = self._attention(asked, keys[:, : self._longest], values[:, : self._longest], self._visible)
            return out[where]
        held_keys, held_values = self._keys[layer], self._values[layer]
        assert held_keys is not None
        assert held_values is not None
        ends = self.lengths + self.step  # where this token stands in each row
        every = torch.arange(rows, device=q.device)
        held_keys[every, ends], held_values[every, ends] = k, v
        mask = torch.arange(self._room, device=q.device) <= ends[:, None]  # (B, room)
        return self._attention(q.unsqueeze(1), held_keys, held_values, mask[:, None, None]).squeeze(1)

    @staticmethod
    def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """(B, N, heads, head_dim) throughout."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return attention_sdpa(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask).transpose(1, 2)
