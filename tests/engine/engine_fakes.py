"""A real but tiny language model, calls for it, and its lone run: the oracle for everything the engine does.

The model attends, so a token computed on a wrong block changes what follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from grammar_fakes import allowed_after, start_matcher

from omnilmm.config import EngineConfig
from omnilmm.engine.engine import Engine, Failed, Output, Ticket, Tokens
from omnilmm.engine.newcomers import Newcomers, nobody
from omnilmm.engine.plan import Draw, Drawn, Needs, Plan, ShouldYield, StepResult, never
from omnilmm.engine.runner import ModelRunner
from omnilmm.engine.sampling import draw_tokens
from omnilmm.errors import OmniError
from omnilmm.messages import (
    Embedding,
    FinishReason,
    GenerateCall,
    ImageInput,
    Prefill,
    Prompt,
    Sampling,
    Span,
    TokenLogprob,
)
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import LanguageConfig
from omnilmm.models.decoder import LanguageModel

HIDDEN = 32
VOCAB = 61
PICTURE_ID = 3
CONFIG = EngineConfig(num_blocks=64, block_size=4, max_step_tokens=64, max_sequences=8, max_waiting=64, max_context=128)


def make_model(dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Two layers, grouped keys, random weights large enough that every token of the context matters."""
    config = LanguageConfig(
        hidden=HIDDEN,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        vocab_size=VOCAB,
        max_context=128,
        norm_eps=1e-6,
        rope_theta=100.0,
    )
    model = LanguageModel(config)
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                scale = 1.0 if name == "embedding.weight" else 2.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.to(dtype).requires_grad_(False).eval()


def make_vectors(key: str, length: int) -> Embedding:
    """The vectors every test means by this key."""
    generator = torch.Generator().manual_seed(sum(key.encode()) * 1009 + length)
    vectors = torch.randn(length, HIDDEN, generator=generator)
    return Embedding("float32", (length, HIDDEN), vectors.numpy().tobytes())


def make_ids(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Text ids, none of them a picture's or one of the first few."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, VOCAB, (num_tokens,), generator=generator).tolist())


def make_call(
    ids: Sequence[int] | int = 10,
    *,
    max_tokens: int = 8,
    pictures: Sequence[tuple[str, int, int]] = (),
    with_vectors: bool = True,
    request_id: str = "r",
    seed: int = 0,
    sampling: Sampling | None = None,
    **fields: object,
) -> GenerateCall:
    """A call on these ids (or so many random ones); `pictures` are (key, start, length) and overwrite ids."""
    tokens = list(make_ids(ids, seed) if isinstance(ids, int) else ids)
    images = []
    for key, start, length in pictures:
        tokens[start : start + length] = [PICTURE_ID] * length
        images.append(ImageInput(key, start, length, make_vectors(key, length) if with_vectors else None))
    spans = tuple(Span(image.start, image.length, index) for index, image in enumerate(images))
    sampling = replace(sampling, max_tokens=max_tokens) if sampling else Sampling(max_tokens=max_tokens)
    call = GenerateCall(
        request_id=request_id,
        prompt=Prompt(tuple(tokens), spans, penalty_ids=(1,)),
        images=tuple(images),
        sampling=sampling,
    )
    return replace(call, **fields)  # type: ignore[arg-type]


@torch.inference_mode()
def lone_run(model: LanguageModel, call: GenerateCall) -> tuple[int, ...]:
    """What the call generates by itself: contiguous keys, the whole prompt in one piece, no engine."""
    sampling = call.sampling
    embeds = model.embed(torch.tensor(call.prompt.ids + call.emitted))
    for image in call.images:
        raw = bytearray(make_vectors(image.key, image.length).data)
        vectors = torch.frombuffer(raw, dtype=torch.float32).view(image.length, HIDDEN)
        embeds[image.start : image.start + image.length] = vectors
    attend = DenseAttend(model.config.num_layers)
    generated = list(call.emitted)
    while len(generated) < sampling.max_tokens and not (generated and generated[-1] in sampling.stop_ids):
        positions = torch.arange(len(attend), len(attend) + len(embeds))
        logits = model.logits(model(embeds, positions, attend)[-1:])
        seen = (*call.prompt.penalty_ids, *generated)
        draw = Draw(sampling, len(generated), tuple(generated), seen, allowed_after(call, generated))
        generated.append(draw_tokens(logits, [draw])[0].id)
        embeds = model.embed(torch.tensor(generated[-1:]))
    return tuple(generated[len(call.emitted) :])


@dataclass
class Answer:
    """All that came of one call."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prefill: Prefill | None = None
    finish: FinishReason | None = None
    error: OmniError | None = None
    needed: list[str] = field(default_factory=list)

    def add(self, output: Output) -> None:
        match output:
            case Tokens():
                assert self.finish is None
                assert self.error is None
                assert (output.batch.prefill is None) == (self.prefill is not None), "prefill is told exactly once"
                self.ids += output.batch.ids
                self.logprobs += output.batch.logprobs
                self.prefill = self.prefill or output.batch.prefill
                self.finish = output.batch.finish
            case Failed():
                self.error = output.error
            case Needs():
                self.needed += output.keys


class Driver:
    """Steps an engine by hand and keeps what it says, checking its books after every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.answers: dict[int, Answer] = {}

    def submit(self, call: GenerateCall) -> int:
        return self.add(self.engine.submit(call, matcher=start_matcher(call)))

    def add(self, ticket: Ticket) -> int:
        self.answers[ticket.sequence_id] = Answer(needed=list(ticket.missing))
        self.engine.check_integrity()
        return ticket.sequence_id

    def step(self, newcomers: Newcomers = nobody) -> list[Output]:
        outputs = self.engine.step(newcomers)
        self.engine.check_integrity()
        for output in outputs:
            self.answers[output.sequence_id].add(output)
        return outputs

    def finish(self, *, max_steps: int = 2000) -> None:
        """Step until there is nothing to do."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to rest")

    def run(self, *calls: GenerateCall) -> list[Answer]:
        ids = [self.submit(call) for call in calls]
        self.finish()
        return [self.answers[sequence_id] for sequence_id in ids]


class ComesLate:
    """Newcomers of whom there is none before the n-th time they are asked for."""

    def __init__(self, call: GenerateCall, *, num_asked: int) -> None:
        self._call = call
        self._num_left = num_asked

    def __call__(self) -> tuple[GenerateCall, ...]:
        self._num_left -= 1
        return () if self._num_left > 0 else (self._call,)


class RecordingRunner:
    """A model runner that keeps the plans it ran."""

    def __init__(self, runner: ModelRunner) -> None:
        self.plans: list[Plan] = []
        self._runner = runner

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    def run(self, plan: Plan, should_yield: ShouldYield = never) -> StepResult:
        if plan.rows:
            self.plans.append(plan)
        return self._runner.run(plan, should_yield)

    def computed(self, sequence_id: int) -> int:
        """Tokens computed for a sequence so far."""
        return sum(row.num_tokens for plan in self.plans for row in plan.rows if row.sequence_id == sequence_id)


def make_driver(model: LanguageModel, config: EngineConfig = CONFIG, **changes: int) -> Driver:
    config = config.resolve(**changes)
    return Driver(Engine(ModelRunner(model, config), config))


def recorded_driver(model: LanguageModel, **changes: int) -> tuple[Driver, RecordingRunner]:
    config = CONFIG.resolve(**changes)
    runner = RecordingRunner(ModelRunner(model, config))
    return Driver(Engine(runner, config)), runner


def all_ids(answers: Iterable[Answer]) -> list[tuple[int, ...]]:
    return [answer.ids for answer in answers]


class PaperRunner:
    """Computes nothing: every row that ends its sequence draws the same id. For questions about plans alone."""

    vocab_size = VOCAB

    def __init__(self, token_id: int = 7) -> None:
        self.plans: list[Plan] = []
        self._token_id = token_id

    def run(self, plan: Plan, should_yield: ShouldYield = never) -> StepResult:
        self.plans.append(plan)
        return StepResult({row.sequence_id: Drawn(self._token_id) for row in plan.rows if row.draw is not None})

    def last(self) -> dict[int, int]:
        """Tokens paid to each sequence in the latest step."""
        return {row.sequence_id: row.num_tokens for row in self.plans[-1].rows}


def paper_driver(**changes: int) -> tuple[Driver, PaperRunner]:
    runner = PaperRunner()
    return Driver(Engine(runner, CONFIG.resolve(**changes))), runner
