"""flex_attention as its fused kernels do it, in the open: of the keys, only the named blocks are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from omnilmm.engine.backend import Backend
from omnilmm.engine.engine import Engine
from omnilmm.engine.paged import PagedAttention
from omnilmm.engine.runner import ModelRunner


def listed_kernel(
    q: Tensor, keys: Tensor, values: Tensor, *, block_mask: BlockMask, scale: float, **options: Any
) -> Tensor:
    """q (N, heads, num_queries, head_dim) over keys and values (1, kv_heads, num_keys, head_dim).

    The mask is asked about partly seen blocks only, as the fused kernels do. A run without blocks gives NaN.
    """
    assert block_mask.BLOCK_SIZE[0] >= q.shape[2]
    out = torch.full_like(q, torch.nan)
    size = block_mask.BLOCK_SIZE[1]
    groups = q.shape[1] // keys.shape[1]
    for run in range(len(q)):
        partly, fully = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, run, size), torch.tensor([]).long()
        if block_mask.full_kv_num_blocks is not None:
            fully = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, run, size)
        places = torch.cat((partly, fully))
        if not len(places):
            continue
        queries = torch.arange(q.shape[2])[:, None]
        sees = torch.ones(q.shape[2], len(places), dtype=torch.bool)
        sees[:, : len(partly)] = block_mask.mask_mod(torch.tensor(run), torch.tensor(0), queries, partly)
        k, v = (rows[0][:, places].repeat_interleave(groups, dim=0) for rows in (keys, values))
        scores = (q[run] @ k.transpose(1, 2) * scale).masked_fill(~sees, -torch.inf)
        out[run] = scores.softmax(dim=-1) @ v
    return out


def _listed(num_blocks: Tensor, pages: Tensor, run: int, size: int) -> Tensor:
    """Places of the keys in a run's blocks."""
    listed = pages[run, 0, 0, : int(num_blocks[run, 0, 0])].long()
    return (listed[:, None] * size + torch.arange(size)).flatten()


def static_backend(config, calls: list[int] | None = None) -> Backend:
    """The backend of a GPU, with static decode steps that are called as they are; `calls` hears of each."""

    def record(compute):
        def step():
            result = compute()
            if calls is not None:
                calls.append(len(result[0]))
            return result

        return step

    return Backend(PagedAttention(config, kernel=listed_kernel), has_graphs=True, record=record)


def static_engine(model, config, calls: list[int] | None = None) -> Engine:
    return Engine(ModelRunner(model, config, backend=static_backend(config, calls)), config)
