"""Attention over the pool where it lies, by block tables, with torch's flex_attention. Made for CUDA.

Queries come in runs: the neighbouring tokens of one sequence, all runs of a call equally long. A decode is a run of
one; the chunk of a prompt is cut into runs of TILE. Runs are the batch dimension, the pool is the one sequence of keys
that they share, and a block mask names for each run the blocks that it reads; of others, nothing is read.

Calls have few shapes, because a kernel is compiled for each: decodes are padded to the next of DECODE_SIZES, and the
runs of chunks go NUM_TILES at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from omnilmm.config import EngineConfig
from omnilmm.engine.batch import Batch
from omnilmm.engine.kv import PagedKV
from omnilmm.engine.plan import Row
from omnilmm.models.attention import Attend
from omnilmm.models.capture import bucket_of

DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Decodes in one call, padded to one of these."""

TILE = 128
"""Queries of a chunk in one run. flex_attention's own kernel for many queries wants no fewer."""

NUM_TILES = 8
"""Runs of chunks in one call. A run without blocks costs next to nothing."""

MIN_BLOCK = MIN_HEAD_DIM = 16
"""The smallest sides of a matrix product in a Triton kernel."""

Kernel = Callable[..., Tensor]
"""As torch's flex_attention."""


def compiled_kernel() -> Kernel:
    """flex_attention, compiled at the first call of each shape."""
    return torch.compile(  # type: ignore[call-overload]  # knows more than its overloads say
        flex_attention,
        dynamic=False,
        fullgraph=True,  # rather fail than attend unfused, through a matrix of all queries and the whole pool
        recompile_limit=2 * (len(DECODE_SIZES) + 1),
        isolate_recompiles=True,
    )


def can_page(block_size: int, head_dim: int) -> bool:
    """Whether the CUDA kernels take blocks of this size: a power of two, and large enough for their products."""
    return block_size >= MIN_BLOCK and block_size.bit_count() == 1 and head_dim >= MIN_HEAD_DIM


@dataclass(frozen=True, slots=True)
class Runs:
    """N runs of queries and the blocks they read."""

    block_ids: Tensor  # (N, max_blocks) int32; behind the last one of a run stands any block
    num_blocks: Tensor  # (N,) int32; 0 for a run that is there for padding only
    starts: Tensor  # (N,) int32, position of each run's first query


class PagedAttention:
    """The attention backend: an AttendFactory, and `decode` for a step whose tensors stay in place.

    Args:
        kernel: for tests; flex_attention, compiled for each shape, if not given.
    """

    def __init__(self, config: EngineConfig, *, kernel: Kernel | None = None) -> None:
        self.max_blocks = -(-config.max_context // config.block_size)
        self._kernel = kernel or compiled_kernel()
        # Left to themselves, the kernels would multiply with more keys at a time than small blocks have.
        self._decode_options = {"BLOCK_N": min(64, config.block_size)}
        self._tile_options = {"BLOCK_M": 64, **self._decode_options}

    def __call__(self, batch: Batch, kv: PagedKV) -> Attend:
        return _PagedAttend(batch, kv, self)

    @torch.inference_mode()
    def warm_up(self, kv: PagedKV, *, num_heads: int, max_rows: int) -> None:
        """Compile what a step of any rows needs, so that no request waits for it. Reads and writes nothing."""
        most = bucket_of(max_rows, DECODE_SIZES) or DECODE_SIZES[-1]
        example = kv.blocks(0)[0]
        for num_runs, num_queries in (*((size, 1) for size in DECODE_SIZES if size <= most), (NUM_TILES, TILE)):
            block_ids = torch.zeros(num_runs, self.max_blocks, dtype=torch.int32, device=example.device)
            runs = Runs(block_ids, block_ids[:, 0].clone(), block_ids[:, 0].clone())
            rows = example.new_zeros(num_runs * num_queries, num_heads, example.shape[-1])
            self.attend(kv, 0, _as_runs(rows, num_queries), self.mask(kv, runs, num_queries=num_queries))

    def decode(self, kv: PagedKV, slots: Tensor, runs: Runs) -> Attend:
        """Attention of N decodes (N,) on the device already. Launches kernels and waits for nothing."""
        return _Decode(self, kv, slots, self.mask(kv, runs, num_queries=1))

    def mask(self, kv: PagedKV, runs: Runs, *, num_queries: int) -> BlockMask:
        """What each run of `num_queries` may see, the same for every layer."""
        pool = _Pool.of(kv)
        size, spacing = pool.block_size, pool.spacing
        order = torch.arange(runs.block_ids.shape[1], dtype=torch.int32, device=runs.starts.device)
        is_own = order < runs.num_blocks[:, None]  # (N, max_blocks)
        # Where each block of the pool stands in a run; the column behind the last block takes what is no run's.
        places = torch.full((len(is_own), pool.num_blocks + 1), -1, dtype=torch.int32, device=order.device)
        columns = torch.where(is_own, runs.block_ids, pool.num_blocks).long()
        places.scatter_(1, columns, torch.where(is_own, order, -1))
        starts = runs.starts

        def sees(run: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            place, offset = places[run, key // spacing], key % spacing
            return (place >= 0) & (offset < size) & (place * size + offset <= starts[run] + query)

        pages = runs.block_ids * (spacing // size)
        if num_queries == 1:  # told apart, full blocks would not be shared out among a GPU's processors
            return _block_mask(runs.num_blocks, pages, sees, num_queries, pool)
        # Blocks that lie before a run are seen by all of it: no position of theirs is asked about.
        num_full = torch.minimum((starts + 1) // size, runs.num_blocks)
        rest = (order + num_full[:, None]).clamp(max=len(order) - 1).long()
        partly = pages.gather(1, rest)
        return _block_mask(runs.num_blocks - num_full, partly, sees, num_queries, pool, full=(num_full, pages))

    def attend(self, kv: PagedKV, layer: int, q: Tensor, mask: BlockMask) -> Tensor:
        """What N runs of queries q (N, heads, num_queries, head_dim) read in a layer: as q."""
        keys, values = _Pool.of(kv).rows(kv, layer)
        grouped = q.shape[1] != keys.shape[1]
        return self._kernel(
            q,
            keys,
            values,
            block_mask=mask,
            scale=q.shape[-1] ** -0.5,
            enable_gqa=grouped,
            kernel_options=self._tile_options if q.shape[2] > 1 else self._decode_options,
        )


@dataclass(frozen=True, slots=True)
class _Pool:
    """The pool as flex_attention sees it: for each head one long run of keys.

    The keys of a block lie in one piece, those of the next one `spacing` keys further, and between them those of other
    heads and the values. So block b begins at key `b * spacing`, and a mask leaves out what is between.
    """

    num_blocks: int
    block_size: int
    spacing: int

    @classmethod
    def of(cls, kv: PagedKV) -> _Pool:
        blocks, _ = kv.blocks(0)  # (num_blocks, block_size, kv_heads, head_dim)
        spacing, rest = divmod(blocks.stride(0), blocks.stride(1))
        assert rest == 0, "blocks begin between two keys"
        assert spacing % blocks.shape[1] == 0, "blocks begin within a page"
        return cls(blocks.shape[0], blocks.shape[1], spacing)

    @property
    def num_keys(self) -> int:
        return (self.num_blocks - 1) * self.spacing + self.block_size

    def rows(self, kv: PagedKV, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each (1, kv_heads, num_keys, head_dim): views, whose heads overlap."""
        keys, values = (self._rows(blocks) for blocks in kv.blocks(layer))
        return keys, values

    def _rows(self, blocks: Tensor) -> Tensor:
        _, _, num_heads, head_dim = blocks.shape
        _, row, head, element = blocks.stride()
        shape = (1, num_heads, self.num_keys, head_dim)
        return blocks.as_strided(shape, (self.num_keys * row, head, row, element))


def _block_mask(
    num_blocks: Tensor,
    pages: Tensor,
    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    num_queries: int,
    pool: _Pool,
    *,
    full: tuple[Tensor, Tensor] = (None, None),  # type: ignore[assignment]
) -> BlockMask:
    num_full, full_pages = full
    return BlockMask.from_kv_blocks(
        num_blocks[:, None, None],
        pages[:, None, None],
        None if num_full is None else num_full[:, None, None],
        None if full_pages is None else full_pages[:, None, None],
        BLOCK_SIZE=(TILE, pool.block_size),
        mask_mod=sees,
        seq_lengths=(num_queries, pool.num_keys),
        compute_q_blocks=False,  # for training only
    )


class _Decode:
    """N decodes and nothing else."""

    def __init__(self, backend: PagedAttention, kv: PagedKV, slots: Tensor, mask: BlockMask) -> None:
        self._backend, self._kv, self._mask = backend, kv, mask
        self._places = kv.places(slots)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._kv.write(layer, self._places, k, v)
        return self._backend.attend(self._kv, layer, q[:, :, None], self._mask).squeeze(2)


@dataclass(frozen=True, slots=True)
class _Run:
    """A run on the host: `count` tokens of a row from its token `offset` on, the first of them the step's `first`."""

    row: Row
    first: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class _Call:
    """Runs that are attended to in one call."""

    tokens: Tensor  # (num_runs * num_queries,) int64, the step's token of each query; 0 for padding
    places: Tensor  # (num_own,) int64, where in the call those queries stand that are no padding
    own: Tensor  # (num_own,) int64, and which token of the step each of them is
    num_queries: int
    mask: BlockMask


class _PagedAttend:
    """A step of any rows."""

    def __init__(self, batch: Batch, kv: PagedKV, backend: PagedAttention) -> None:
        self._kv, self._backend = kv, backend
        self._places = kv.places(batch.slots)
        self._calls = tuple(_calls(batch, kv, backend))
        if len(batch.begun):
            kv.begin(batch.begun)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._kv.write(layer, self._places, k, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for call in self._calls:
            queries = _as_runs(q[call.tokens], call.num_queries)
            seen = self._backend.attend(self._kv, layer, queries, call.mask)
            out[call.own] = seen.transpose(1, 2).flatten(0, 1)[call.places]
        return out


def _as_runs(rows: Tensor, num_queries: int) -> Tensor:
    """(N * num_queries, heads, head_dim) -> (N, heads, num_queries, head_dim)."""
    return rows.unflatten(0, (-1, num_queries)).transpose(1, 2)


def _calls(batch: Batch, kv: PagedKV, backend: PagedAttention) -> Iterator[_Call]:
    decodes: list[_Run] = []
    tiles: list[_Run] = []
    for row, first in zip(batch.rows, batch.firsts, strict=True):
        if row.num_tokens == 1:
            decodes.append(_Run(row, first, 0, 1))
            continue
        offsets = range(0, row.num_tokens, TILE)
        tiles += [_Run(row, first + offset, offset, min(TILE, row.num_tokens - offset)) for offset in offsets]
    for begin in range(0, len(decodes), DECODE_SIZES[-1]):
        group = decodes[begin : begin + DECODE_SIZES[-1]]
        size = bucket_of(len(group), DECODE_SIZES)
        assert size is not None, "a group is no larger than the largest size"
        yield _call(group, kv, backend, num_runs=size, num_queries=1, device=batch.device)
    for begin in range(0, len(tiles), NUM_TILES):
        group = tiles[begin : begin + NUM_TILES]
        yield _call(group, kv, backend, num_runs=NUM_TILES, num_queries=TILE, device=batch.device)


def _call(
    group: Sequence[_Run],
    kv: PagedKV,
    backend: PagedAttention,
    *,
    num_runs: int,
    num_queries: int,
    device: torch.device,
) -> _Call:
    block_ids = np.zeros((num_runs, backend.max_blocks), dtype=np.int32)
    num_blocks, starts = np.zeros((2, num_runs), dtype=np.int32)
    tokens = np.zeros((num_runs, num_queries), dtype=np.int64)
    is_own = np.zeros((num_runs, num_queries), dtype=np.bool_)
    for index, run in enumerate(group):
        starts[index] = run.row.start + run.offset
        num_blocks[index] = -(-(int(starts[index]) + run.count) // kv.block_size)
        block_ids[index, : num_blocks[index]] = run.row.block_ids[: num_blocks[index]]
        tokens[index, : run.count] = np.arange(run.first, run.first + run.count)
        is_own[index, : run.count] = True
    runs = Runs(*(torch.from_numpy(numbers).to(device) for numbers in (block_ids, num_blocks, starts)))
    return _Call(
        tokens=torch.from_numpy(tokens.ravel()).to(device),
        places=torch.from_numpy(np.flatnonzero(is_own)).to(device),
        own=torch.from_numpy(tokens[is_own]).to(device),
        num_queries=num_queries,
        mask=backend.mask(kv, runs, num_queries=num_queries),
    )
