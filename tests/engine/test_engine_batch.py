from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_fakes import CONFIG, make_model
from torch.testing import assert_close

from omnilmm.engine import batch as module
from omnilmm.engine.batch import GatheredAttend, GatheredAttention, build_batch
from omnilmm.engine.held import HeldDecodes, rounded
from omnilmm.engine.kv import PagedKV
from omnilmm.engine.plan import Draw, Row
from omnilmm.messages import Sampling
from omnilmm.models.attention import attention_products, attention_reference

CPU = torch.device("cpu")
SIZE = CONFIG.block_size
DRAW = Draw(Sampling(1), 0)


def make_kv(model=None, num_blocks: int = CONFIG.num_blocks) -> PagedKV:
    return PagedKV(
        replace(CONFIG, num_blocks=num_blocks), (model or make_model()).config, dtype=torch.float32, device=CPU
    )


def make_row(sequence_id: int, start: int, num_tokens: int, block_ids: tuple[int, ...]) -> Row:
    return Row(sequence_id, tuple(range(start, start + num_tokens)), start, block_ids, draw=DRAW)


ROWS = [
    make_row(0, 5, 6, (9, 4, 7)),  # a chunk behind a prefix
    make_row(1, 6, 1, (1, 2)),
    make_row(2, 0, 3, (20,)),  # a chunk at the beginning
    make_row(3, 14, 1, (30, 3, 31, 12)),
    make_row(4, 0, 1, (40,)),
]


def test_tokens_stand_where_the_batch_says():
    batch = build_batch(ROWS, block_size=SIZE, device=CPU)
    assert [row.sequence_id for row in batch.rows] == [3, 1, 4, 0, 2]  # decodes first, longest first
    assert batch.firsts == (0, 1, 2, 3, 9)
    assert batch.lasts.tolist() == [0, 1, 2, 8, 11]
    assert batch.positions.tolist() == [14, 6, 0, 5, 6, 7, 8, 9, 10, 0, 1, 2]
    assert batch.ids.tolist() == batch.positions.tolist()
    assert batch.slots.tolist()[:3] == [12 * SIZE + 2, 2 * SIZE + 2, 40 * SIZE]
    assert batch.slots.tolist()[3:6] == [4 * SIZE + 1, 4 * SIZE + 2, 4 * SIZE + 3]
    assert batch.slots.tolist()[6:] == [7 * SIZE, 7 * SIZE + 1, 7 * SIZE + 2, 20 * SIZE, 20 * SIZE + 1, 20 * SIZE + 2]
    assert batch.drawing.tolist() == [0, 1, 2, 3, 4]


def test_only_rows_that_end_their_sequence_draw():
    rows = [make_row(0, 0, 2, (0,)), Row(1, (5, 6, 7), 0, (1,)), make_row(2, 3, 1, (2,))]
    batch = build_batch(rows, block_size=SIZE, device=CPU)
    assert [batch.rows[index].sequence_id for index in batch.drawing.tolist()] == [2, 0]


@pytest.mark.parametrize("max_padding", [0, 1024])
@pytest.mark.parametrize("small", [0, 1024])
@pytest.mark.parametrize("tile", [2, 128])
def test_attention_reads_each_rows_own_past_and_no_foreign_slot(max_padding, small, tile, monkeypatch):
    monkeypatch.setattr(module, "MAX_PADDING", max_padding)
    monkeypatch.setattr(module, "SMALL", small)
    monkeypatch.setattr(module, "QUERY_TILE", tile)
    generator = torch.Generator().manual_seed(1)
    kv = make_kv()
    kv._pool.fill_(torch.nan)  # whatever is read of a block that nobody began shows
    batch = build_batch(ROWS, block_size=SIZE, device=CPU)
    past = {row.sequence_id: torch.randn(2, row.end, 2, 8, generator=generator) for row in ROWS}
    for row in ROWS:
        if row.start:
            slots = torch.tensor([row.block_ids[p // SIZE] * SIZE + p % SIZE for p in range(row.start)])
            kv.begin(slots // SIZE)
            keys, values = past[row.sequence_id][:, : row.start]
            kv.write(1, kv.places(slots), keys, values)
    q = torch.randn(12, 4, 8, generator=generator)
    k = torch.cat([past[row.sequence_id][0, row.start :] for row in batch.rows])
    v = torch.cat([past[row.sequence_id][1, row.start :] for row in batch.rows])
    out = GatheredAttend(batch, kv)(1, q, k, v)
    assert out.shape == q.shape
    for row, first in zip(batch.rows, batch.firsts, strict=True):
        keys, values = past[row.sequence_id].transpose(1, 2).unsqueeze(1)  # each (1, kv_heads, end, head_dim)
        queries = q[first : first + row.num_tokens].transpose(0, 1).unsqueeze(0)
        mask = torch.ones(row.num_tokens, row.end, dtype=torch.bool).tril(row.start)
        expected = attention_reference(queries, keys, values, scale=8**-0.5, mask=mask)
        assert_close(out[first : first + row.num_tokens], expected[0].transpose(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("start", "num_tokens", "begins"),
    [(0, 1, True), (0, SIZE, False), (SIZE, 1, True), (SIZE + 1, 1, False), (1, SIZE, True), (SIZE - 1, 1, False)],
)
def test_a_block_is_begun_once(start, num_tokens, begins):
    row = make_row(0, start, num_tokens, tuple(range(5, 5 - (-(start + num_tokens) // SIZE))))
    assert build_batch([row], block_size=SIZE, device=CPU).begun.tolist() == ([row.block_ids[-1]] if begins else [])


def test_widths_are_rounded_by_an_eighth_at_most():
    widths = [rounded(n) for n in range(1, 1000)]
    assert widths[:16] == list(range(1, 17))
    assert all(n <= width <= 1.125 * n for n, width in enumerate(widths, start=1))
    assert len(set(widths)) < 70


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([9], [(0, 1)]),
        ([9, 9, 8], [(0, 3)]),
        ([2000, 1500, 300, 290], [(0, 2), (2, 4)]),
        ([3000, 20, 10], [(0, 1), (1, 3)]),
    ],
)
def test_lengths_are_grouped_until_padding_costs_more_than_a_call(lengths, expected):
    assert list(module._similar(lengths)) == expected


def test_slots_keep_what_was_written():
    kv = make_kv()
    k, v = torch.randn(2, 3, 2, 8)
    kv.write(0, kv.places(torch.tensor([5, 2, 9])), k, v)
    window = kv.window(torch.tensor([[2, 1], [0, 2]]))  # two sequences of two blocks each
    kv.read(0, window)
    keys, values = window.keys, window.values
    assert keys.shape == values.shape == (2 * 2, 2 * SIZE, 8)
    for got, rows in ((keys, k), (values, v)):
        first, second = got.unflatten(0, (2, 2))  # (kv_heads, positions, head_dim) of each
        assert torch.equal(first[:, 9 - 2 * SIZE], rows[2])
        assert torch.equal(first[:, SIZE + 5 - SIZE], rows[0])
        assert torch.equal(second[:, 2], rows[1])
        assert torch.equal(second[:, SIZE + 9 - 2 * SIZE], rows[2])
    layer_keys, layer_values = kv.blocks(0)
    assert layer_keys.shape == layer_values.shape == (CONFIG.num_blocks, SIZE, 2, 8)
    assert torch.equal(layer_keys[9 // SIZE, 9 % SIZE], k[2])
    assert torch.equal(layer_values[9 // SIZE, 9 % SIZE], v[2])
    assert not kv.blocks(1)[0].any()


def test_a_block_that_is_begun_forgets_its_past_in_every_layer():
    kv = make_kv()
    kv._pool.fill_(torch.nan)
    kv.begin(torch.tensor([3, 1]))
    for layer in range(2):
        for tensor in kv.blocks(layer):
            assert tensor.isnan().all(dim=(1, 2, 3)).tolist()[:5] == [True, False, True, False, True]
            assert not tensor[[1, 3]].any()


def held_rows(ends: dict[int, int]) -> list[Row]:
    """Rows of one token each, longest first, every sequence with blocks of its own."""
    rows = [
        make_row(index, end - 1, 1, tuple(range(index * 8, index * 8 - (-end // SIZE)))) for index, end in ends.items()
    ]
    return sorted(rows, key=lambda row: -row.end)


def test_a_group_that_goes_on_reads_what_a_new_one_would(monkeypatch):
    kv, gathered = make_kv(num_blocks=256), []
    monkeypatch.setattr(PagedKV, "gather", lambda kv, *a, _gather=PagedKV.gather: (gathered.append(1), _gather(kv, *a)))
    factory = GatheredAttention()
    generator = torch.Generator().manual_seed(2)
    steps = [
        ({0: 5, 1: 3}, 1),
        ({0: 6, 1: 4}, 0),
        ({0: 7, 1: 5}, 0),  # 1 begins a block
        ({0: 8, 1: 6, 2: 1}, 1),  # another one has come
        ({0: 9, 1: 7, 2: 2}, 0),
        ({0: 10, 2: 3}, 1),  # one has gone
        ({0: 11, 2: 3}, 1),  # one stood still, as after an eviction
    ]
    for ends, expected in steps:
        batch = build_batch(held_rows(ends), block_size=SIZE, device=CPU)
        q = torch.randn(len(ends), 4, 8, generator=generator)
        k, v = torch.randn(2, len(ends), 2, 8, generator=generator)
        del gathered[:]
        attend, anew = factory(batch, kv), GatheredAttend(batch, kv)
        outs = [attend(layer, q, k + layer, v - layer) for layer in range(kv.num_layers)]
        assert len(gathered) == kv.num_layers * expected, ends
        for layer, out in enumerate(outs):
            assert torch.equal(out, anew(layer, q, k + layer, v - layer)), (ends, layer)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_what_goes_on_writes_to_the_pool_at_the_end_of_a_step(num_rows, monkeypatch):
    """Keys and values of all layers in one piece, and the same ones as a step that is gathered writes."""
    written = []
    monkeypatch.setattr(PagedKV, "write", lambda kv, *a, _write=PagedKV.write: (written.append(1), _write(kv, *a)))
    one, other = make_kv(), make_kv()
    factory = GatheredAttention()
    generator = torch.Generator().manual_seed(3)
    for end in (6, 7, 8, 9):
        batch = build_batch(held_rows({index: end - index for index in range(num_rows)}), block_size=SIZE, device=CPU)
        attend, anew = factory(batch, one), GatheredAttend(batch, other)
        del written[:]
        for layer in range(one.num_layers):
            q = torch.randn(num_rows, 4, 8, generator=generator)
            k, v = torch.randn(2, num_rows, 2, 8, generator=generator)
            attend(layer, q, k, v)
            assert len(written) == (layer + 1 if end == 6 else 0)
            anew(layer, q, k, v)
            del written[layer + 1 if end == 6 else 0 :]
        assert torch.equal(one._pool, other._pool), end


def test_a_step_that_stops_halfway_leaves_nothing_that_goes_on():
    kv = make_kv()
    factory = GatheredAttention()
    q, k, v = torch.randn(1, 4, 8), *torch.randn(2, 1, 2, 8)
    for end in (6, 7):
        attend = factory(build_batch(held_rows({0: end}), block_size=SIZE, device=CPU), kv)
        for layer in range(kv.num_layers if end == 6 else 1):
            attend(layer, q, k, v)
    again = factory(build_batch(held_rows({0: 7}), block_size=SIZE, device=CPU), kv)
    fresh = GatheredAttend(build_batch(held_rows({0: 7}), block_size=SIZE, device=CPU), kv)
    for layer in range(kv.num_layers):
        assert torch.equal(again(layer, q, k, v), fresh(layer, q, k, v))


def test_products_get_what_is_held_in_one_piece(monkeypatch):
    """A slice of it would be copied in every layer of every step."""
    monkeypatch.setattr(module, "SMALL", 0)
    given = []

    def products(q, k, v, **how):
        given.append(k.is_contiguous() and v.is_contiguous())
        return attention_products(q, k, v, **how)

    monkeypatch.setattr(module, "attention_products", products)
    kv = make_kv()
    rows = [make_row(1, 6, 1, (1, 2)), make_row(2, 5, 1, (3, 4))]
    attend = GatheredAttention()(build_batch(rows, block_size=SIZE, device=CPU), kv)
    q = torch.randn(2, kv.num_heads, kv.head_dim)
    attend(0, q, q, q)
    assert given == [True]


def test_a_group_that_outgrows_its_room_is_gathered_anew():
    kv = make_kv(num_blocks=256)
    held = HeldDecodes(kv)
    (group,) = held.hold([held_rows({0: 1})])
    assert group is not None
    end = 1
    while True:
        end += 1
        (later,) = held.hold([held_rows({0: end})])
        if later is not group:
            break
    assert end == group.width + 1
    assert later.width > group.width
    assert later.newest is None


def test_what_is_held_stays_within_a_quarter_of_the_pool():
    kv = make_kv(num_blocks=256)
    held = HeldDecodes(kv)
    rows = [make_row(index, 4 * SIZE - 1, 1, (0, 1, 2, 3)) for index in range(13)]
    for _ in range(2):
        assert held.hold([rows]) == [None]
    assert held.hold([rows[:12]])[0] is not None
