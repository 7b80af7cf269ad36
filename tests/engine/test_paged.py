"""The paged backend attends as the gathered one does. Here flex_attention runs unfused; one test compiles it."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from engine_fakes import CONFIG, make_model
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex
from torch.testing import assert_close

from omnilmm.config import EngineConfig
from omnilmm.engine import paged as module
from omnilmm.engine.batch import GatheredAttend, build_batch
from omnilmm.engine.kv import PagedKV
from omnilmm.engine.paged import DECODE_SIZES, NUM_TILES, PagedAttention, Runs, can_page
from omnilmm.engine.plan import Row
from omnilmm.models.config import LanguageConfig

CPU = torch.device("cpu")
SIZE = CONFIG.block_size


@pytest.fixture(autouse=True)
def _unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # no warning, and no compiler


def unfused(config: EngineConfig = CONFIG) -> PagedAttention:
    return PagedAttention(config, kernel=flex.flex_attention)


def random_rows(seed: int, num_rows: int, *, longest: int = 40) -> list[Row]:
    """Decodes and chunks, at block boundaries and off them; half of the rows share a beginning of some blocks."""
    source = random.Random(seed)
    free = list(range(CONFIG.num_blocks))
    source.shuffle(free)
    shared = [free.pop() for _ in range(3)]
    rows = []
    for index in range(num_rows):
        num_shared = source.choice([0, 2, 3])
        least = num_shared * SIZE
        start = least + source.choice([0, 1, SIZE - 1, SIZE, source.randrange(longest)])
        count = source.choice([1, 1, 2, SIZE, source.randrange(1, longest)])
        num_blocks = -(-(start + count) // SIZE)
        own = [free.pop() for _ in range(num_blocks - num_shared)]
        ids = tuple(source.randrange(61) for _ in range(count))
        rows.append(Row(index, ids, start, (*shared[:num_shared], *own)))
    return rows


def filled_kv(rows: list[Row], seed: int, model: LanguageConfig) -> PagedKV:
    """Random numbers in the blocks of these rows, as if their past had been computed."""
    kv = PagedKV(CONFIG, model, dtype=torch.float32, device=CPU)
    kv._pool.normal_(generator=torch.Generator().manual_seed(seed))
    return kv


def both(rows: list[Row], seed: int, *, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, PagedKV, PagedKV]:
    """What either backend reads for random queries in both layers, and the pools they leave."""
    config = make_model().config
    model = LanguageConfig(
        **{**{name: getattr(config, name) for name in config.__slots__}, "num_kv_heads": num_kv_heads}
    )
    batch = build_batch(rows, block_size=SIZE, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    num_tokens, head_dim = len(batch.ids), model.head_dim
    outs, pools = [], []
    inputs = [
        (
            torch.randn(num_tokens, num_heads, head_dim, generator=generator),
            torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator),
            torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator),
        )
        for _ in range(2)
    ]
    for factory in (GatheredAttend, unfused()):
        kv = filled_kv(rows, seed, model)
        attend = factory(batch, kv)
        outs.append(torch.stack([attend(layer, *qkv) for layer, qkv in enumerate(inputs)]))
        pools.append(kv)
    return outs[0], outs[1], pools[0], pools[1]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 2)])
@pytest.mark.parametrize("seed", range(6))
def test_it_reads_what_the_gathered_backend_reads(seed, num_heads, num_kv_heads, monkeypatch):
    monkeypatch.setattr(module, "TILE", 8)  # so that chunks have several runs, and runs several calls
    monkeypatch.setattr(module, "NUM_TILES", 3)
    rows = random_rows(seed, num_rows=1 + seed)
    gathered, paged, left, right = both(rows, seed, num_heads=num_heads, num_kv_heads=num_kv_heads)
    assert_close(paged, gathered, atol=2e-6, rtol=0)
    assert torch.equal(left._pool, right._pool)


def test_more_decodes_than_the_largest_call(monkeypatch):
    monkeypatch.setattr(module, "DECODE_SIZES", (1, 2, 4))
    rows = [row for seed in range(3) for row in random_rows(seed, 1)]
    rows = [Row(index, (5,), index, (index + 10, index + 20, index + 30)) for index in range(11)]
    gathered, paged, *_ = both(rows, 7, num_heads=4, num_kv_heads=2)
    assert_close(paged, gathered, atol=2e-6, rtol=0)


def test_a_chunk_longer_than_a_run_at_full_size():
    rows = [Row(0, tuple([1] * 100), 20, tuple(range(30))), Row(1, (4,), 6, (40, 41))]
    gathered, paged, *_ = both(rows, 8, num_heads=4, num_kv_heads=2)
    assert_close(paged, gathered, atol=2e-6, rtol=0)


def test_calls_have_few_shapes():
    seen = set()

    def kernel(q: Tensor, keys: Tensor, values: Tensor, **options: object) -> Tensor:
        seen.add((tuple(q.shape), options["block_mask"].kv_indices.shape))
        return q

    config = CONFIG.resolve(num_blocks=400)
    kv = PagedKV(config, make_model().config, dtype=torch.float32, device=CPU)
    backend = PagedAttention(config, kernel=kernel)
    for num_rows in range(1, 65, 3):
        rows = [Row(index, (1,), index, tuple(range(index // SIZE + 1))) for index in range(num_rows)]
        rows.append(Row(99, (1,) * (1 + num_rows), 0, tuple(range(100, 120))))
        backend(build_batch(rows, block_size=SIZE, device=CPU), kv)(0, *_queries(2 * num_rows + 1))
    tiles = {shape for shape in seen if shape[0][2] > 1}
    assert len(tiles) == 1
    assert len(seen) <= len(DECODE_SIZES) + 1
    assert {shape[0][0] for shape in seen} <= {*DECODE_SIZES, NUM_TILES}


def _queries(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(num_tokens, 4, 8), torch.zeros(num_tokens, 2, 8), torch.zeros(num_tokens, 2, 8)


def test_warming_up_calls_every_shape_that_steps_have_and_touches_nothing():
    shapes: dict[bool, set[object]] = {True: set(), False: set()}
    is_warming = True

    def kernel(q: Tensor, keys: Tensor, values: Tensor, **options: object) -> Tensor:
        mask = options["block_mask"]
        shapes[is_warming].add((q.shape, q.stride(), mask.kv_indices.shape, mask.full_kv_indices is None))
        return q

    config = CONFIG.resolve(num_blocks=400)
    kv = PagedKV(config, make_model().config, dtype=torch.float32, device=CPU)
    backend = PagedAttention(config, kernel=kernel)
    backend.warm_up(kv, num_heads=4, max_rows=8)
    assert not kv._pool.any()
    is_warming = False
    for num_rows in (1, 2, 3, 8):
        rows = [Row(index, (1,), index, tuple(range(index // SIZE + 1))) for index in range(num_rows)]
        rows.append(Row(99, (1,) * 120, 0, tuple(range(100, 130))))
        backend(build_batch(rows, block_size=SIZE, device=CPU), kv)(0, *_queries(num_rows + 120))
    assert shapes[False] == shapes[True]


def test_a_mask_names_each_runs_own_blocks_and_tells_the_full_ones():
    kv = PagedKV(CONFIG, make_model().config, dtype=torch.float32, device=CPU)
    block_ids = torch.zeros(2, 32, dtype=torch.int32)
    block_ids[0, :4] = torch.tensor([9, 4, 7, 30])
    runs = Runs(block_ids, torch.tensor([4, 0], dtype=torch.int32), torch.tensor([7, 0], dtype=torch.int32))
    mask = unfused().mask(kv, runs, num_queries=8)
    pages = 2 * 2  # keys and values of two heads: so far apart are two blocks
    assert mask.full_kv_num_blocks.flatten().tolist() == [2, 0]  # positions 0 to 7 are seen by the query at 7 already
    assert mask.full_kv_indices[0, 0, 0, :2].tolist() == [9 * pages, 4 * pages]
    assert mask.kv_num_blocks.flatten().tolist() == [2, 0]
    assert mask.kv_indices[0, 0, 0, :2].tolist() == [7 * pages, 30 * pages]
    decodes = unfused().mask(kv, runs, num_queries=1)
    assert decodes.full_kv_num_blocks is None
    assert decodes.kv_indices[0, 0, 0, :4].tolist() == [9 * pages, 4 * pages, 7 * pages, 30 * pages]


@pytest.mark.parametrize(
    ("block_size", "head_dim", "fits"),
    [(16, 64, True), (128, 128, True), (8, 64, False), (48, 64, False), (16, 8, False), (64, 80, True)],
)
def test_what_the_cuda_kernels_take(block_size, head_dim, fits):
    assert can_page(block_size, head_dim) is fits


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPU with g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about parts of itself
def test_compiled_it_reads_no_block_that_is_not_named(monkeypatch):
    """The fused kernel on CPU: everything that no row owns, and what is between its blocks, is not a number."""
    monkeypatch.undo()
    config = EngineConfig(num_blocks=6, block_size=16, max_context=16 * 6 * 4)  # as many blocks as the pool has pages
    model = LanguageConfig(16, 2, 4, 2, 16, 16, 61, config.max_context, 1e-6, 100.0)
    kv = PagedKV(config, model, dtype=torch.float32, device=CPU)
    kv._pool.fill_(torch.nan)
    rows = [Row(0, (1,), 20, (4, 1)), Row(1, (1,), 32, (4, 3, 0))]
    used = torch.tensor([0, 1, 3, 4])
    kv._pool[:, used] = torch.randn(2, 4, *kv._pool.shape[2:], generator=torch.Generator().manual_seed(3))
    batch = build_batch(rows, block_size=16, device=CPU)
    kernel = PagedAttention(config)
    queries = [tuple(torch.randn(2, heads, 16) for heads in (4, 2, 2)) for _ in range(2)]
    with torch.inference_mode():
        expected = [GatheredAttend(batch, kv)(layer, *qkv) for layer, qkv in enumerate(queries)]
        before = counters["stats"]["unique_graphs"]
        for _ in range(2):  # a step later, the masks are other tensors
            attend = kernel(batch, kv)
            for layer, qkv in enumerate(queries):
                assert_close(attend(layer, *qkv), expected[layer], atol=2e-6, rtol=0)
        assert counters["stats"]["unique_graphs"] == before + 1  # the same kernel for every layer and step
