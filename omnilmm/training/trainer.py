"""The loop: rows in, gradients added up, a step made; log, evaluation and state on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from omnilmm.errors import OmniError
from omnilmm.training.config import TrainingConfig
from omnilmm.training.curve import Display, Quiet, RunLog
from omnilmm.training.learner import Learner
from omnilmm.training.optimise import Optimiser, clip_gradients, rate_at
from omnilmm.training.rows import Batch, collate
from omnilmm.training.sources import RowSource, row_index
from omnilmm.training.state import load_state, save_state, states
from omnilmm.training.workers import OneWorker, Workers


class Evaluator(Protocol):
    def measure(self, learner: Learner) -> Mapping[str, float]:
        """Figures of the learner as it is, by name, each from 0 to 1 where it is an accuracy."""
        ...


@dataclass(slots=True)
class _Tally:
    """Sums since the last line of the log. Part of a state, so that the line after a resume is the same."""

    steps: int = 0
    loss: float = 0.0
    grounding: float = 0.0
    right: float = 0.0
    norm: float = 0.0


class Trainer:
    """One run in `folder`, from its beginning or from the latest state there.

    Every worker makes one; the first alone writes files. All numbers that decide the run come from the config's seed
    and the step, never from the clock or from how often the run was interrupted.
    """

    def __init__(
        self,
        learner: Learner,
        source: RowSource,
        config: TrainingConfig,
        folder: Path,
        *,
        evaluator: Evaluator | None = None,
        workers: Workers | None = None,
        display: Display | None = None,
    ) -> None:
        self.step = 0
        self._learner, self._source, self._config, self._folder = learner, source, config, folder
        self._evaluator = evaluator
        self._workers = workers or OneWorker()
        self._display = display or Quiet()
        self._optimiser = Optimiser(learner, config.optimiser)
        self._tally = _Tally()
        self._speaks = True  # whether anything was to be said in the last step
        self._grounding_weight = config.scenes.grounding if config.scenes is not None else 0.0

    @property
    def log_path(self) -> Path:
        return self._folder / "log.jsonl"

    def resume(self) -> bool:
        """Go on from the latest state in the folder; whether there was one.

        Raises:
            ConfigError: the state cannot be read or belongs to another run.
        """
        found = states(self._folder / "states")
        if not found:
            return False
        counters = load_state(found[-1], self._learner, self._optimiser)
        self.step, self._tally = counters["step"], _Tally(**counters["tally"])
        return True

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the last step, or until `should_stop` says so between two steps (a state is saved then, if the
        run saves any). Whether the end was reached.

        Raises:
            OmniError: the loss is no longer finite.
        """
        config = self._config
        log = RunLog(self.log_path, step=self.step) if self._workers.rank == 0 else None
        begun, first = time.monotonic(), self.step
        while self.step < config.steps:
            if self._agreed(should_stop()):
                self._save()
                return False
            self._make_step()
            entry = None
            if log is not None and config.log_every and self.step % config.log_every == 0:
                rows = (self.step - first) * config.batch * config.accumulate * self._workers.world
                entry = self._entry(rows / (time.monotonic() - begun))
                log.write(entry)
            self._display.advance(self.step, entry)
            if self._is_due(config.evaluate_every) and self._speaks:
                self._evaluate(log)
            if self._is_due(config.save_every):
                self._save()
        return True

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self._config.steps)

    def _agreed(self, stop: bool) -> bool:
        """Whether any worker wants to stop: then all do, behind the same step."""
        asked = torch.tensor([float(stop)])
        self._workers.add_up([asked])
        return bool(asked)

    # -- the rate -------------------------------------------------------------------------------------

    def _rate(self, step: int) -> float:
        """Learning by sight is a run of its own, with a warm-up and a decline; all that follows is another."""
        config = self._config
        sight = 0 if config.scenes is None else min(config.scenes.sight, config.steps)
        if step < sight:
            return rate_at(step, sight, config.optimiser)
        return rate_at(step - sight, config.steps - sight, config.optimiser)

    def _encoder_rate(self, step: int) -> float:
        scenes = self._config.scenes
        return scenes.encoder_rate if scenes is not None and step >= scenes.sight else 1.0

    # -- one step -------------------------------------------------------------------------------------

    def _make_step(self) -> None:
        config = self._config
        batches = [*self._batches()]
        counts = torch.tensor([sum(b.num_targets for b in batches), sum(len(b.squares) for b in batches)])
        counts = counts.double()
        self._workers.add_up([counts])
        self._speaks = speaks = bool(counts[0])
        num_targets, num_pictures = (max(1.0, count) for count in counts.tolist())
        sums = torch.zeros(3, dtype=torch.float64)  # answers, grounding, right
        self._optimiser.zero_grad()
        for number, batch in enumerate(batches):
            self._seed_dropout(number)
            losses = self._learner(batch)
            loss = losses.answers / num_targets
            if self._grounding_weight:
                loss = loss + self._grounding_weight * losses.grounding / num_pictures
            loss.backward()
            sums += torch.tensor([losses.answers.item(), losses.grounding.item(), losses.num_right.item()])
        gradients = self._gradients(speaks=speaks)
        self._workers.add_up(gradients)
        self._workers.add_up([sums])
        answers, grounding, right = sums.tolist()
        if not math.isfinite(answers + grounding):
            raise OmniError(f"the loss is not finite at step {self.step}")
        norm = clip_gradients(gradients, config.optimiser.clip)
        self._optimiser.step(self._rate(self.step), encoder_rate=self._encoder_rate(self.step))
        self.step += 1
        tally = self._tally
        tally.steps += 1
        tally.loss += answers / num_targets
        tally.grounding += grounding / num_pictures
        tally.right += right / num_targets
        tally.norm += norm

    def _batches(self) -> Iterator[Batch]:
        """This worker's share of the step's rows."""
        config, workers = self._config, self._workers
        for number in range(config.accumulate):
            start = ((self.step * config.accumulate + number) * workers.world + workers.rank) * config.batch
            indices = (
                row_index(position, self._source.num_rows, config.seed)
                for position in range(start, start + config.batch)
            )
            yield collate([self._source.row(index, self.step) for index in indices], fill=True)

    def _seed_dropout(self, number: int) -> None:
        key = np.random.SeedSequence((self._config.seed, self.step, number, self._workers.rank))
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))

    def _gradients(self, *, speaks: bool) -> list[torch.Tensor]:
        """All gradients, the same on every worker: zeros where no row of this one reached a parameter. While nobody
        says anything what speaks has no gradient anywhere, and is left alone by the optimiser too."""
        gradients = []
        for _, _, parameter in self._learner.learning():
            if parameter.grad is None and speaks:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        return gradients

    # -- what is written ------------------------------------------------------------------------------

    def _entry(self, rows_per_s: float) -> dict[str, float]:
        tally, self._tally = self._tally, _Tally()
        entry = {
            "step": self.step,
            "loss": tally.loss / tally.steps,
            "token_accuracy": tally.right / tally.steps,
            "gradient_norm": tally.norm / tally.steps,
            "rate": self._rate(self.step - 1),
            "rows_per_s": round(rows_per_s, 2),
        }
        return entry | ({"grounding": tally.grounding / tally.steps} if self._grounding_weight else {})

    def _evaluate(self, log: RunLog | None) -> None:
        if log is None or self._evaluator is None:
            return
        measured = {name: round(value, 4) for name, value in self._evaluator.measure(self._learner).items()}
        log.write({"step": self.step, "accuracy": measured})
        figures = "  ".join(f"{name} {value:.3f}" for name, value in measured.items())
        self._display.say(f"step {self.step}: {figures}")

    def _save(self) -> None:
        if self._workers.rank == 0:
            counters = {"step": self.step, "tally": asdict(self._tally)}
            save_state(self._folder / "states", self._learner, self._optimiser, counters, keep=self._config.keep_states)
