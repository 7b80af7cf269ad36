"""The models with their losses, and which of their parameters learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from omnilmm.config import ImagePolicy, InputHandling
from omnilmm.models.config import ModelConfig
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.vision import ImageEncoder
from omnilmm.models.weights import load_encoder, load_language_model
from omnilmm.training.attend import PlainProducts, RowAttend
from omnilmm.training.config import Learning, LoraConfig
from omnilmm.training.grounding import Grounding
from omnilmm.training.lora import Adapter
from omnilmm.training.rows import Batch

LORA, GROUNDING = "lora", "grounding"
_TARGET_STEP = 256


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over a batch: cross-entropy in nats over its targets, the additional loss over its pictures, and how many
    targets had the highest score. Both losses have a gradient."""

    answers: Tensor
    grounding: Tensor
    num_right: Tensor


class Learner(nn.Module):
    """One model in training. `precision` is the dtype products are computed in."""

    def __init__(
        self,
        config: ModelConfig,
        encoder: ImageEncoder,
        language: LanguageModel,
        *,
        precision: str = "float32",
        adapter: Adapter | None = None,
        grounding: Grounding | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.policy: ImagePolicy = config.image_policy(InputHandling.SAFE)
        self.encoder, self.language, self.adapter, self.grounding = encoder, language, adapter, grounding
        self.precision: torch.dtype = getattr(torch, precision)
        self.label_smoothing = label_smoothing
        if adapter is not None:
            adapter.attach(language)

    @property
    def device(self) -> torch.device:
        return self.language.embedding.weight.device

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def encode(self, squares: Tensor) -> Tensor:
        """(P, side, side, 3) uint8 -> (P, num_query, hidden)."""
        pixels = normalised(squares.to(self.device), self.policy).to(self.encoder.vision.patch_embed.weight.dtype)
        if self.device.type != "cpu":
            return self.encoder(pixels)
        with PlainProducts():
            return self.encoder(pixels)

    def embed(self, batch: Batch, vectors: Tensor | None) -> Tensor:
        """(T, hidden): the tokens' own vectors, and those of the pictures in their places."""
        embeds = self.language.embed(batch.ids)
        if vectors is None:
            return embeds
        rows = vectors.flatten(0, 1).index_select(0, batch.picture_rows)
        return embeds.index_copy(0, batch.picture_tokens, rows.to(embeds.dtype))

    def forward(self, batch: Batch) -> Losses:
        """The losses of one batch. Where nothing is to be said the language model does not run."""
        batch = moved(batch, self.device)
        answers = grounding = torch.zeros((), device=self.device)
        num_right = torch.zeros((), dtype=torch.int64, device=self.device)
        with self.autocast():
            vectors = self.encode(batch.squares) if len(batch.squares) else None
            if batch.num_targets:
                hidden = self.language(self.embed(batch, vectors), batch.positions, RowAttend(batch))
                logits = self._logits(hidden, batch.target_tokens)
                smoothing = self.label_smoothing if self.training else 0.0
                answers = functional.cross_entropy(logits, batch.target_ids, reduction="sum", label_smoothing=smoothing)
                num_right = (logits.detach().argmax(-1) == batch.target_ids).sum()
            if self.grounding is not None and vectors is not None and batch.facts is not None:
                grounding = self.grounding.loss(vectors, batch.facts)
        return Losses(answers, grounding, num_right)

    def _logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(T, hidden), (M,) -> (M, vocab) float32, computed in few shapes as in `rows.collate`."""
        num_targets = len(tokens)
        padded = functional.pad(tokens, (0, -num_targets % _TARGET_STEP))
        return self.language.logits(hidden.index_select(0, padded))[:num_targets]

    def learning(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(part, name, parameter) of everything that learns, always in the same order."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield part_of(name), name, parameter


def part_of(name: str) -> str:
    """The part that a parameter of a Learner belongs to: a Learning, LORA or GROUNDING."""
    head, _, rest = name.partition(".")
    if head == "encoder":
        return Learning.VISION if rest.startswith("vision.") else Learning.RESAMPLER
    if head == "language":
        return Learning.EMBEDDINGS if rest.startswith(("embedding.", "head.")) else Learning.LLM
    return LORA if head == "adapter" else GROUNDING


def choose_learning(learner: Learner, learn: tuple[Learning, ...]) -> None:
    """Let exactly these parts learn, and the adapter and the additional layer where there are any.

    The stored position tables stay as they are. So do the rows of EVA's fused bias that stand for the keys: they
    belong to no tensor of the checkpoint.
    """
    for name, parameter in learner.named_parameters():
        part = part_of(name)
        parameter.requires_grad_((part in learn and not name.endswith("pos_embed")) or part in (LORA, GROUNDING))
    vision = learner.encoder.vision.config
    if not vision.has_key_bias and Learning.VISION in learn:
        kept = torch.ones(3 * vision.width, device=learner.device)
        kept[vision.width : 2 * vision.width] = 0
        for name, parameter in learner.encoder.named_parameters():
            if name.endswith("qkv.bias"):
                parameter.register_hook(lambda gradient: gradient * kept)


def load_learner(
    folder: Path,
    config: ModelConfig,
    *,
    learn: tuple[Learning, ...],
    lora: LoraConfig | None = None,
    num_facts: int = 0,
    label_smoothing: float = 0.0,
    fact_smoothing: float = 0.0,
    weights: str = "float32",
    precision: str = "float32",
    device: str = "cpu",
) -> Learner:
    """A checkpoint ready to learn. New parameters are drawn from torch's generator.

    Raises:
        CheckpointError: the folder does not hold the weights of `config`.
    """
    adapter = Adapter(config, lora).to(device) if lora is not None else None
    grounding = None
    if num_facts:
        grounding = Grounding(config.language.hidden, num_facts, smoothing=fact_smoothing).to(device)
    learner = Learner(
        config,
        load_encoder(folder, config, dtype=weights, device=device),
        load_language_model(folder, config, dtype=weights, device=device),
        precision=precision,
        adapter=adapter,
        grounding=grounding,
        label_smoothing=label_smoothing,
    )
    choose_learning(learner, learn)
    return learner.train()


def normalised(squares: Tensor, policy: ImagePolicy) -> Tensor:
    """(P, side, side, 3) uint8 -> (P, 3, side, side) float32, as `image.transform.normalise` does it."""
    mean = torch.tensor(policy.mean, device=squares.device)[:, None, None]
    std = torch.tensor(policy.std, device=squares.device)[:, None, None]
    return (squares.permute(0, 3, 1, 2).float() / 255 - mean) / std


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on another device; itself if it is there."""
    if batch.ids.device == device:
        return batch
    facts = None if batch.facts is None else batch.facts.to(device)
    tensors = {name: getattr(batch, name).to(device) for name in batch.__slots__ if name != "facts"}
    return Batch(**tensors, facts=facts)
