"""A run's state on disk: parameters that learn, the optimiser's moments and the counters. A run that resumes goes on as
if it had never stopped, to the last bit on the same machine.

A state is a folder ``step-00000100`` with `state.safetensors` and `state.json`, made aside and renamed when complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnilmm.errors import ConfigError
from omnilmm.training.learner import Learner
from omnilmm.training.optimise import Optimiser

TENSORS_FILE, COUNTERS_FILE = "state.safetensors", "state.json"
_PARAMETER, _MEMORY = "parameter.", "optimiser."


def save_state(folder: Path, learner: Learner, optimiser: Optimiser, counters: Mapping[str, Any], *, keep: int) -> Path:
    """Write a state into `folder` and remove all but the last `keep`. `counters` is plain JSON with a "step"."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {_PARAMETER + name: parameter.detach() for _, name, parameter in learner.learning()}
    tensors |= {_MEMORY + name: tensor for name, tensor in optimiser.tensors()}
    target = folder / f"step-{counters['step']:08d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial / TENSORS_FILE)
    (partial / COUNTERS_FILE).write_text(json.dumps(counters), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in states(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def states(folder: Path) -> list[Path]:
    """The complete states in `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


@torch.no_grad()
def load_state(state: Path, learner: Learner, optimiser: Optimiser) -> dict[str, Any]:
    """Fill learner and optimiser from a state; returns its counters.

    Raises:
        ConfigError: it is not whole, or belongs to a run in which other parameters learn.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        counters = json.loads((state / COUNTERS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(state / TENSORS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"The state {state.name} cannot be read.") from error
    learning = {name: parameter for _, name, parameter in learner.learning()}
    stored = {name.removeprefix(_PARAMETER): t for name, t in tensors.items() if name.startswith(_PARAMETER)}
    if stored.keys() != learning.keys():
        raise ConfigError(f"In the state {state.name} other parameters learn than in this run.")
    for name, parameter in learning.items():
        parameter.copy_(stored[name])
    optimiser.load({name.removeprefix(_MEMORY): t for name, t in tensors.items() if name.startswith(_MEMORY)})
    return dict(counters)
