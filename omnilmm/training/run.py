"""A whole run from its settings: start or resume, train, export."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml

from omnilmm.config import InputHandling
from omnilmm.errors import ConfigError
from omnilmm.models.checkpoint import resolve_checkpoint
from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.device import pick_device
from omnilmm.prompt.template import Template, load_template
from omnilmm.training.config import TrainingConfig, plain
from omnilmm.training.curve import Display, Quiet, draw_curve
from omnilmm.training.evaluation import Exam, HeldOutLoss, make_papers
from omnilmm.training.export import num_parameters, save_checkpoint
from omnilmm.training.learner import Learner, load_learner
from omnilmm.training.nano import write_nano
from omnilmm.training.scene_source import SceneSource
from omnilmm.training.scenes import Split
from omnilmm.training.scenes_draw import load_scenery
from omnilmm.training.sequences import SequenceMaker
from omnilmm.training.sources import JsonlSource, RowSource
from omnilmm.training.state import states
from omnilmm.training.trainer import Evaluator, Trainer
from omnilmm.training.workers import Workers, current_workers

EXAM_SEED = 1_000_003
"""World of the scenes looked at during training; an exam after training takes another."""


def train(
    config: TrainingConfig,
    *,
    resume: bool = False,
    display: Display | None = None,
    workers: Workers | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Run to the end and export. What is written into the folder `config.output`:

    config.yaml, log.jsonl, loss.png   the settings, the figures, the curve
    states/                            what a run resumes from
    start/                             where a nano began
    checkpoint/                        the official layout, if any part of the model itself learned
    adapter/                           peft's two files, with `lora`

    Args:
        config: the run.
        resume: go on from the latest state in the folder. Without it the folder must hold no run yet.
        display: told what happens.
        workers: this process among others; by default torch's process group, if there is one.
        should_stop: asked between steps; True ends the run early, with a state to resume from.

    Returns:
        The folder of the checkpoint, or of the adapter where only that learned; None if stopped early.

    Raises:
        ConfigError: the settings, the data or the folder do not allow the run.
        CheckpointError: the checkpoint cannot be used.
    """
    workers, display = workers or current_workers(), display or Quiet()
    folder = Path(config.output)
    leads = workers.rank == 0
    _open_folder(folder, config, resume=resume, leads=leads)
    base = _base(config, folder, leads=leads, workers=workers)
    model = read_model_config(base)
    template = load_template(model.family, base, num_image_tokens=model.num_image_tokens)
    source, evaluator = _data(config, model, template, display)
    torch.manual_seed(config.seed)  # an adapter's first numbers
    learner = load_learner(
        base,
        model,
        learn=config.learn,
        lora=config.lora,
        num_facts=source.num_facts,
        label_smoothing=config.label_smoothing,
        fact_smoothing=config.scenes.fact_smoothing if config.scenes is not None else 0.0,
        weights=config.weights,
        precision=config.precision,
        device=pick_device(config.device),
    )
    learns = sum(parameter.numel() for _, _, parameter in learner.learning())
    display.say(f"{num_parameters(learner) / 1e6:.2f} M parameters, {learns / 1e6:.2f} M learn")
    trainer = Trainer(learner, source, config, folder, evaluator=evaluator, workers=workers, display=display)
    if resume and trainer.resume():
        display.say(f"going on from step {trainer.step}")
    is_done = trainer.run(should_stop)
    if leads and find_spec("matplotlib") is None:
        display.say("no loss curve: matplotlib is not installed (the extra train brings it)")
    elif leads:
        draw_curve(trainer.log_path, folder / "loss.png")
    if not is_done:
        return None
    return _export(config, folder, base, learner) if leads else folder


def _open_folder(folder: Path, config: TrainingConfig, *, resume: bool, leads: bool) -> None:
    stored = folder / "config.yaml"
    if resume:
        if not stored.is_file() or yaml.safe_load(stored.read_text(encoding="utf-8")) != plain(config):
            raise ConfigError("The output folder holds no run with exactly these settings to resume.", param="output")
        return
    if leads:
        if stored.exists() or states(folder / "states"):
            raise ConfigError("The output folder holds a run already: resume it or name another.", param="output")
        folder.mkdir(parents=True, exist_ok=True)
        stored.write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")


def _base(config: TrainingConfig, folder: Path, *, leads: bool, workers: Workers) -> Path:
    """The folder of the checkpoint the run begins from."""
    if config.nano is None:
        assert config.checkpoint is not None
        return resolve_checkpoint(config.checkpoint)
    start = folder / "start"
    if leads and not (start / "model.safetensors").is_file():
        write_nano(start, config.nano, seed=config.seed)
    workers.add_up([torch.zeros(1)])  # the others wait here
    return start


def _data(
    config: TrainingConfig, model: ModelConfig, template: Template, display: Display
) -> tuple[RowSource, Evaluator | None]:
    maker = SequenceMaker(model.family, template)
    assert model.vision is not None
    side = model.vision.side
    if config.scenes is not None:
        scenery = load_scenery()
        source = SceneSource(
            config.scenes, maker=maker, side=side, num_image_tokens=model.num_image_tokens, scenery=scenery
        )
        papers = make_papers(Split.TEST, EXAM_SEED, config.scenes.held_out, scenery=scenery, side=side)
        return source, Exam(papers, template)
    assert config.jsonl is not None
    policy = model.image_policy(InputHandling.SAFE)
    made = [
        JsonlSource([Path(path) for path in paths], maker=maker, policy=policy, settings=config.jsonl)
        for paths in (config.jsonl.train, config.jsonl.held_out)
        if paths
    ]
    for jsonl in made:
        display.say(f"{jsonl.num_rows} rows, {jsonl.num_left_out} records left out as too long")
    return made[0], HeldOutLoss(made[1], batch=config.batch) if len(made) > 1 else None


def _export(config: TrainingConfig, folder: Path, base: Path, learner: Learner) -> Path:
    """Write what was learned."""
    adapter = folder / "adapter"
    if learner.adapter is not None:
        adapter.mkdir(exist_ok=True)
        learner.adapter.save(adapter, base=config.checkpoint or str(config.nano))
        if not config.learn:
            return adapter
    return save_checkpoint(
        folder / "checkpoint",
        base,
        learner.config,
        encoder=learner.encoder,
        language=learner.language,
        dtype=config.save_dtype,
    )
