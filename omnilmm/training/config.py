"""What a run's YAML file says, as frozen records. Unknown names and values of the wrong kind are refused by name."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from omnilmm.config import Family
from omnilmm.errors import ConfigError


class Learning(StrEnum):
    """Parts of a model that can learn. The stored position tables of both encoder parts never do."""

    VISION = "vision"
    RESAMPLER = "resampler"
    LLM = "llm"  # the decoder layers and their last norm
    EMBEDDINGS = "embeddings"  # the token embeddings and the output matrix


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The language model's linear layers by their official names."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) for the language model; the names are peft's."""

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = PROJECTIONS
    use_rslora: bool = False  # scale alpha / sqrt(r) instead of alpha / r

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError("r must be at least 1.", param="lora.r")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError("lora_dropout must be from 0 to below 1.", param="lora.lora_dropout")
        if not self.target_modules or set(self.target_modules) - {*PROJECTIONS}:
            raise ConfigError(f"target_modules must be some of {', '.join(PROJECTIONS)}.", param="lora.target_modules")

    @property
    def scale(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass(frozen=True, slots=True)
class JsonlConfig:
    """Conversations from files: one JSON object a line. Picture paths count from the file's own folder.

    Neighbouring records about the same picture share a row, up to `max_group` of them. Records with a longer
    conversation than `max_tokens` are left out, and counted on the screen.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    max_tokens: int = 2048
    max_group: int = 8
    picture_cache_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True)
class ScenesConfig:
    """Synthetic pictures, made as they are needed and never twice.

    `conversations` per picture; `grounding` is the weight of the additional loss; `sight` is the number of steps, at
    the beginning, in which nothing is asked and the encoder alone learns, from the grounding; `encoder_rate` is the
    factor on its learning rate after them; `ramp` is the number of steps after them over which scenes grow from one
    thing to all kinds; `held_out` is the number of pictures for evaluation. `fact_smoothing` is the label smoothing of
    the grounding.
    """

    seed: int = 0
    conversations: int = 8
    grounding: float = 1.0
    fact_smoothing: float = 0.0
    sight: int = 0
    encoder_rate: float = 1.0
    ramp: int = 0
    held_out: int = 100

    def __post_init__(self) -> None:
        if self.conversations < 1 or self.held_out < 1:
            raise ConfigError("conversations and held_out must be at least 1.", param="scenes")
        if min(self.ramp, self.sight, self.grounding, self.encoder_rate) < 0:
            raise ConfigError("sight, ramp, grounding and encoder_rate are not below 0.", param="scenes")
        if not 0 <= self.fact_smoothing < 0.5:
            raise ConfigError("fact_smoothing must be from 0 to below 0.5.", param="scenes.fact_smoothing")
        if self.sight and not self.grounding:
            raise ConfigError("Without grounding there is nothing to learn by sight.", param="scenes.sight")


@dataclass(frozen=True, slots=True)
class OptimiserConfig:
    """AdamW, a linear warm-up, a cosine down to `final_ratio` of the rate. `clip` bounds the gradient's norm.

    `muon` hands the matrices of the tower, the resampler and the decoder layers to Muon (Jordan et al. 2024), with the
    rate scaled as AdamW's is: small models learn several times faster from scratch. For tuning AdamW alone is usual.
    """

    learning_rate: float = 1e-5
    final_ratio: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip: float = 1.0
    muon: bool = False
    part_rates: Mapping[str, float] = field(default_factory=dict)  # factor on the rate, by part; "lora" is one

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.clip <= 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise ConfigError("learning_rate and clip must be above 0.", param="optimiser")
        if set(self.part_rates) - {*Learning, "lora"}:
            raise ConfigError(f"part_rates knows {', '.join(Learning)} and lora.", param="optimiser.part_rates")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """One run. It begins from `checkpoint` (a folder or hub id), or from a new `nano` of a family.

    `batch` rows go through the models at once on each worker; a step is `accumulate` such passes. `weights` is the
    dtype the parameters are held in, `precision` the one the products are computed in. `log_every` etc. count steps;
    0 means never. `label_smoothing` is that of the answers' tokens: the share of each target that goes to all tokens
    alike (Szegedy et al. 2015); losses in evaluation are without it.
    """

    output: str
    steps: int
    checkpoint: str | None = None
    nano: Family | None = None
    jsonl: JsonlConfig | None = None
    scenes: ScenesConfig | None = None
    learn: tuple[Learning, ...] = tuple(Learning)
    lora: LoraConfig | None = None
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    batch: int = 8
    accumulate: int = 1
    label_smoothing: float = 0.0
    weights: str = "float32"
    precision: str = "bfloat16"
    save_dtype: str = "bfloat16"
    device: str = "auto"
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 0
    keep_states: int = 2

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.nano is None):
            raise ConfigError("Name either a checkpoint or a family for nano.", param="checkpoint")
        if (self.jsonl is None) == (self.scenes is None):
            raise ConfigError("Name either jsonl or scenes as the data.", param="jsonl")
        if self.lora is not None and Learning.LLM in self.learn:
            raise ConfigError("With lora the llm itself does not learn: take it out of learn.", param="learn")
        if not self.learn and self.lora is None:
            raise ConfigError("Nothing learns: name parts in learn, or lora.", param="learn")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("label_smoothing must be from 0 to below 1.", param="label_smoothing")
        if self.weights != "float32" and self.learn:
            raise ConfigError("Parts can learn in float32 only; other weights suit lora alone.", param="weights")
        if self.weights not in ("float32", self.precision):
            raise ConfigError("precision must be that of the weights where they are not float32.", param="precision")
        for name in ("steps", "batch", "accumulate", "keep_states"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1.", param=name)
        for name in ("weights", "precision", "save_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ConfigError(f"{name} must be float32 or bfloat16.", param=name)


def read_training_config(path: Path) -> TrainingConfig:
    """The run described by a YAML file.

    Raises:
        ConfigError: it cannot be read, names something unknown, or a value cannot be.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path.name} cannot be read as YAML.") from error
    return parse_training_config(values)


def parse_training_config(values: Any) -> TrainingConfig:
    """The run described by plain values, as YAML or JSON gives them. Raises ConfigError as above."""
    return _record(TrainingConfig, values, "")


def plain(config: TrainingConfig) -> dict[str, Any]:
    """The way back: what `parse_training_config` makes the same record from."""
    return _plain(dataclasses.asdict(config))


_Record = TypeVar("_Record")


def _record(kind: type[_Record], values: Any, at: str) -> _Record:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{at or 'The file'} must hold names with values.", param=at or None)
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise ConfigError(f"There is no setting {_path(at, name)}.", param=_path(at, name))
    required = {f.name for f in dataclasses.fields(kind) if _is_required(f)}  # type: ignore[arg-type]
    if missing := sorted(required - values.keys()):
        raise ConfigError(f"The setting {_path(at, missing[0])} is missing.", param=_path(at, missing[0]))
    return kind(**{name: _value(hints[name], value, _path(at, name)) for name, value in values.items()})


def _is_required(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, at: str) -> Any:
    """`value` as the annotation `hint` wants it."""
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (option for option in get_args(hint) if option is not type(None))
        return None if value is None else _value(inner, value, at)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{at} must be a list.", param=at)
        return tuple(_value(get_args(hint)[0], item, at) for item in value)
    if get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{at} must hold names with values.", param=at)
        return {str(key): _value(get_args(hint)[1], item, at) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, at)  # type: ignore[arg-type]
    if issubclass(hint, StrEnum):
        if value not in {*hint}:
            raise ConfigError(f"{at} must be one of {', '.join(hint)}.", param=at)
        return hint(value)
    return _scalar(hint, value, at)


def _scalar(kind: type, value: Any, at: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, str):  # YAML reads 1e-4 as a word
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{at} must be a number.", param=at) from None
    if type(value) is not kind:
        names: Mapping[type, str] = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
        raise ConfigError(f"{at} must be {names[kind]}.", param=at)
    return value


def _path(at: str, name: Any) -> str:
    return f"{at}.{name}" if at else str(name)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value
