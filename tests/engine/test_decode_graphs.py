"""Static decode steps, called as they are instead of captured: what a graph would replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_fakes import CONFIG, Driver, lone_run, make_call, make_model
from paged_fakes import listed_kernel, static_backend, static_engine
from torch.testing import assert_close

from omnilmm.engine.batch import GatheredAttend, build_batch
from omnilmm.engine.graphs import DecodeGraphs, StaticDecode
from omnilmm.engine.kv import PagedKV
from omnilmm.engine.paged import PagedAttention
from omnilmm.engine.plan import Draw, PictureSlice, Row
from omnilmm.messages import Embedding, Sampling

CPU = torch.device("cpu")
SIZE = CONFIG.block_size
SCRATCH = CONFIG.num_blocks
DRAW = Draw(Sampling(1), 0)
ROWS = [
    Row(0, (7,), 6, (9, 4), draw=DRAW),
    Row(1, (8,), 14, (30, 3, 31, 12), draw=DRAW),
    Row(2, (9,), 0, (20,), draw=DRAW),
    Row(3, (5,), 7, (9, 40), draw=DRAW),  # shares a block with the first
    Row(4, (6,), 8, (1, 2, 5), draw=DRAW),
]
OWN = {block_id for row in ROWS for block_id in row.block_ids}


def make_kv(model) -> PagedKV:
    """Everything that nobody owns is not a number."""
    kv = PagedKV(CONFIG.resolve(num_blocks=SCRATCH + 1), model.config, dtype=torch.float32, device=CPU)
    kv._pool.normal_(generator=torch.Generator().manual_seed(1))
    foreign = [block_id for block_id in range(SCRATCH) if block_id not in OWN]
    kv._pool[:, foreign] = torch.nan
    kv._pool[:, SCRATCH] = 0.0
    return kv


def make_graphs(model, kv, *, max_rows=8, record=lambda step: step) -> DecodeGraphs:
    attention = PagedAttention(CONFIG, kernel=listed_kernel)
    return DecodeGraphs(model, kv, attention, max_rows=max_rows, scratch_block=SCRATCH, record=record)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5])
def test_padding_changes_nothing_and_touches_nobody(model, num_rows):
    rows = ROWS[:num_rows]
    batch = build_batch(rows, block_size=SIZE, device=CPU)
    with torch.inference_mode():
        plain = make_kv(model)
        hidden = model(model.embed(batch.ids), batch.positions, GatheredAttend(batch, plain))
        kv = make_kv(model)
        before = kv._pool.clone()
        out, logits = make_graphs(model, kv).run(batch)
    assert out.shape == (num_rows, model.config.hidden)
    assert_close(out, hidden, atol=1e-5, rtol=0)
    assert_close(logits, model.logits(hidden), atol=1e-4, rtol=0)
    assert_close(kv._pool[:, :SCRATCH], plain._pool[:, :SCRATCH], atol=1e-5, rtol=0, equal_nan=True)
    slots = kv._pool.isclose(before, rtol=0, atol=0, equal_nan=True).all(dim=-1)  # (layers, blocks, 2, heads, size)
    changed = {(block, offset) for _, block, _, _, offset in (~slots).nonzero().tolist()}
    written = {(slot // SIZE, slot % SIZE) for slot in batch.slots.tolist()}
    begun = {(block, offset) for block in batch.begun.tolist() for offset in range(SIZE)}
    scratch = {(SCRATCH, 0)} if num_rows in (3, 5) else set()  # the others fit a size
    assert written | scratch <= changed <= written | scratch | begun


def test_a_step_forgets_the_one_before(model):
    """Four rows after eight: the tables of those that went are gone."""
    kv = make_kv(model)
    attention = PagedAttention(CONFIG, kernel=listed_kernel)
    step = StaticDecode(model, kv, attention, size=4, scratch_block=SCRATCH)
    step.load(ROWS[:4])
    step.send()
    assert step.inputs[1, 2:6].tolist() == [30, 3, 31, 12]
    step.load(ROWS[2:3])
    assert step.inputs[0].tolist()[:4] == [7, 6, 9, 4]  # until it is sent
    step.send()
    assert step.inputs[0, :3].tolist() == [9, 0, 20]
    assert step.inputs[1:].tolist() == [[0, 0] + [SCRATCH] * attention.max_blocks] * 3


def test_only_the_rows_that_draw_get_logits(model):
    rows = [ROWS[0], replace(ROWS[1], draw=None), ROWS[2]]
    kv = make_kv(model)
    batch = build_batch(rows, block_size=SIZE, device=CPU)
    with torch.inference_mode():
        hidden, logits = make_graphs(model, kv).run(batch)
        expected = model.logits(hidden)[[index for index, row in enumerate(batch.rows) if row.draw is not None]]
    assert len(hidden) == 3
    assert_close(logits, expected)


def test_which_steps_stay_in_place(model):
    graphs = make_graphs(model, make_kv(model), max_rows=4)
    assert graphs.can_run(ROWS[:4])
    assert not graphs.can_run(ROWS)
    assert not graphs.can_run([ROWS[0], Row(9, (1, 2), 0, (7,))])
    assert not graphs.can_run([replace(ROWS[0], ranks=range(4))])
    picture = PictureSlice(0, 0, 1, 1, Embedding("float32", (1, model.config.hidden), b""))
    assert not graphs.can_run([replace(ROWS[0], pictures=(picture,))])


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [(1, [1]), (6, [8, 4, 2, 1]), (64, [64, 32, 16, 8, 4, 2, 1]), (500, [64, 32, 16, 8, 4, 2, 1])],
)
def test_sizes_are_recorded_once_the_largest_first(model, max_rows, sizes):
    recorded = []

    def record(compute):
        recorded.append(len(compute()[0]))
        return compute

    make_graphs(model, make_kv(model), max_rows=max_rows, record=record)
    assert recorded == sizes


def test_recording_writes_to_the_scratch_block_only(model):
    kv = make_kv(model)
    before = kv._pool.clone()

    def record(compute):
        compute()
        return compute

    make_graphs(model, kv, record=record)
    assert_close(kv._pool[:, :SCRATCH], before[:, :SCRATCH], atol=0, rtol=0, equal_nan=True)
    assert kv._pool[:, SCRATCH].isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"num_blocks": 14}, {"max_step_tokens": 5}, {"max_sequences": 3}])
def test_an_engine_says_the_same_through_static_steps(model, changes):
    """Pictures, grammar-free sampling, shared beginnings and preemption: every sequence is exact."""
    config = CONFIG.resolve(**changes)
    sampling = Sampling(0, temperature=1.0, seed=3)
    calls = [make_call(5 + 4 * seed, seed=seed, max_tokens=6) for seed in range(4)]
    calls += [make_call(11, pictures=[("a", 2, 5)], max_tokens=5), make_call(9, sampling=sampling, max_tokens=7)]
    calls.append(calls[3])
    steps: list[int] = []
    driver = Driver(static_engine(model, config, steps))
    answers = driver.run(*calls)
    assert [answer.ids for answer in answers] == [lone_run(model, call) for call in calls]
    assert len(steps) > 4
    assert driver.engine.stats().blocks_used == 0


def test_bad_numbers_fail_their_sequence_only_here_too(model):
    poisoned = make_model()
    poisoned.embedding.weight[2] = torch.nan
    never = Sampling(0, logit_bias=((2, -100.0),))
    driver = Driver(static_engine(poisoned, CONFIG))
    for seed in range(3):
        assert driver.run(make_call((2, *range(10, 25)), max_tokens=2))[0].error
        calls = [make_call(5 + n, seed=seed + n, max_tokens=4, sampling=never) for n in (0, 4)]
        assert [answer.ids for answer in driver.run(*calls)] == [lone_run(model, call) for call in calls]


def test_the_scheduler_does_not_know_of_the_scratch_block(model):
    backend = static_backend(CONFIG)
    kv = backend.pool(CONFIG, model.config, dtype=torch.float32, device=CPU)
    assert kv.blocks(0)[0].shape[0] == CONFIG.num_blocks + 1
    plain = replace(backend, has_graphs=False)
    assert plain.pool(CONFIG, model.config, dtype=torch.float32, device=CPU).blocks(0)[0].shape[0] == CONFIG.num_blocks
    assert plain.prepare(model, kv, CONFIG) is None
