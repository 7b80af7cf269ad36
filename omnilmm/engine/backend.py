"""How a runner attends, and whether it replays its decode steps: what the settings say, or what suits the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omnilmm.config import EngineConfig
from omnilmm.engine.batch import AttendFactory, GatheredAttention
from omnilmm.engine.graphs import DecodeGraphs, Recorder
from omnilmm.engine.kv import PagedKV
from omnilmm.engine.paged import MIN_BLOCK, MIN_HEAD_DIM, PagedAttention, can_page
from omnilmm.errors import ConfigError
from omnilmm.models.capture import pick_graphs
from omnilmm.models.config import LanguageConfig
from omnilmm.models.decoder import LanguageModel


@dataclass(frozen=True, slots=True)
class Backend:
    """An attention backend, and with `has_graphs` (a PagedAttention only) decode steps that stay in place.

    `record` is for tests: what to make of such a step in place of a CUDA graph.
    """

    attend: AttendFactory
    has_graphs: bool = False
    record: Recorder | None = None

    def pool(self, config: EngineConfig, model: LanguageConfig, *, dtype: torch.dtype, device: torch.device) -> PagedKV:
        """The KV pool, with a block more than the scheduler knows of where rows of padding need one."""
        num_blocks = config.num_blocks + self.has_graphs
        return PagedKV(config.resolve(num_blocks=num_blocks), model, dtype=dtype, device=device)

    def prepare(self, model: LanguageModel, kv: PagedKV, config: EngineConfig) -> DecodeGraphs | None:
        """Compile what is to be compiled, and capture decode steps; None where every step is launched as it comes."""
        if not isinstance(self.attend, PagedAttention):
            return None
        self.attend.warm_up(kv, num_heads=model.config.num_heads, max_rows=config.max_sequences)
        if not self.has_graphs:
            return None
        return DecodeGraphs(
            model,
            kv,
            self.attend,
            max_rows=config.max_sequences,
            scratch_block=config.num_blocks,
            record=self.record,
        )


def pick_backend(config: EngineConfig, model: LanguageConfig, device: torch.device) -> Backend:
    """The backend that `config` asks for; where it leaves the choice, paged with graphs on CUDA, gathered elsewhere.

    Raises:
        ConfigError: the device, the model or another setting does not allow what was asked for.
    """
    has_graphs = pick_graphs(config.cuda_graphs, device, param="cuda_graphs")
    is_fit = can_page(config.block_size, model.head_dim)
    match config.attention:
        case "gathered":
            is_paged = False
        case "paged" if device.type != "cuda":
            raise ConfigError(f"attention paged is made for CUDA, and the device is {device.type}", param="attention")
        case "paged" if not is_fit:
            raise ConfigError(
                f"attention paged takes a block_size that is a power of two and at least {MIN_BLOCK}, and heads of at "
                f"least {MIN_HEAD_DIM}: block_size is {config.block_size}, the model's heads are {model.head_dim} wide",
                param="attention",
            )
        case "paged":
            is_paged = True
        case "auto":
            is_paged = device.type == "cuda" and is_fit
        case _:
            raise ConfigError("attention must be one of auto, gathered, paged", param="attention")
    if is_paged:
        return Backend(PagedAttention(config), has_graphs)
    if config.cuda_graphs:
        raise ConfigError("cuda_graphs needs attention paged", param="cuda_graphs")
    return Backend(GatheredAttention())
