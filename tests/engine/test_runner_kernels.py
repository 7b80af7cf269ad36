"""A runner whose model has kernels of our own: its tokens are torch's, and the same in any pieces and company."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from engine_fakes import CONFIG

from omnilmm.engine.plan import Draw, Plan, Row, StepYielded
from omnilmm.engine.runner import ModelRunner
from omnilmm.messages import Sampling
from omnilmm.models.config import LanguageConfig
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.native import Kernels, try_kernels
from omnilmm.models.native_decode import NativeDecoder
from omnilmm.models.packed import prepare_for_decoding

MODEL = LanguageConfig(
    hidden=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_width=96,
    vocab_size=61,
    max_context=128,
    norm_eps=1e-6,
    rope_theta=100.0,
)
PROMPTS = ((5, 9, 1, 22), tuple(range(30)), (7,) * 15)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = try_kernels()
    if found is None:
        pytest.skip("no compiler, or a CPU without AVX512-BF16 or -VBMI")
    return found


def make_runner(kernels: Kernels | None, *, block_size: int = 16) -> ModelRunner:
    torch.manual_seed(7)
    model = LanguageModel(MODEL).to(torch.bfloat16).requires_grad_(False).eval()
    prepared = prepare_for_decoding(model, kernels=kernels)
    return ModelRunner(prepared, CONFIG.resolve(num_blocks=40, block_size=block_size, max_context=64))


def row(index: int, ids: Sequence[int], start: int) -> Row:
    blocks = tuple(range(index * 8, index * 8 + 4))
    draw = Draw(Sampling(max_tokens=32), position=start + len(ids))
    return Row(sequence_id=index, ids=tuple(ids), start=start, block_ids=blocks, draw=draw)


def prefill() -> Plan:
    return Plan(tuple(row(index, ids, 0) for index, ids in enumerate(PROMPTS)))


def step(number: int, *, indices: Sequence[int] = (0, 1, 2)) -> Plan:
    """The sequences go on with tokens that are known already."""
    return Plan(tuple(row(i, [(11 * number + 3 * i) % 61], len(PROMPTS[i]) + number) for i in indices))


def drawn(runner: ModelRunner, plan: Plan) -> list[int]:
    result = runner.run(plan)
    assert not result.failures
    return [result.drawn[row.sequence_id].id for row in plan.rows]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every step that was computed by the kernels."""
    made: list[int] = []
    decode = NativeDecoder.decode

    def counted(self, embeds, *args, **options):
        made.append(len(embeds))
        return decode(self, embeds, *args, **options)

    monkeypatch.setattr(NativeDecoder, "decode", counted)
    return made


def test_tokens_are_those_of_torch(kernels, calls):
    ours, theirs = make_runner(kernels), make_runner(None)
    pairs = list(zip(drawn(ours, prefill()), drawn(theirs, prefill()), strict=True))
    assert calls == [sum(map(len, PROMPTS))]
    for number in range(20):
        pairs += zip(drawn(ours, step(number)), drawn(theirs, step(number)), strict=True)
    assert calls[1:] == [3] * 20
    assert sum(a == b for a, b in pairs) >= 0.9 * len(pairs)  # bfloat16 has near-ties
    assert len({a for a, _ in pairs}) > 10


def test_decodes_beside_a_chunk_are_those_of_torch(kernels, calls):
    ours, theirs = make_runner(kernels), make_runner(None)
    for runner in (ours, theirs):
        runner.run(Plan(prefill().rows[:2]))
    pairs = []
    for number in range(12):
        rows = step(number, indices=(0, 1)).rows
        if number % 3 == 2:  # somebody comes
            rows = (*rows, row(2, PROMPTS[2], 0))
        pairs += zip(drawn(ours, Plan(rows)), drawn(theirs, Plan(rows)), strict=True)
    assert calls[1:] == [2, 2, 2 + len(PROMPTS[2])] * 4
    assert sum(a == b for a, b in pairs) >= 0.9 * len(pairs)


@pytest.mark.parametrize("size", [1, 7, 16, 29])
def test_a_prompt_in_pieces_leaves_the_same_behind(kernels, size):
    """Bit for bit: its keys and values, and the scores of what comes next."""
    ids = PROMPTS[1]
    whole, pieces = make_runner(kernels), make_runner(kernels)
    drawn(whole, prefill())
    for start in range(0, len(ids), size):
        drawn(pieces, Plan((row(1, ids[start : start + size], start),)))
    own = list(row(1, ids, 0).block_ids)
    kept = []
    for runner in (whole, pieces):
        drawn(runner, step(0, indices=(1,)))
        # (layers, 2, heads, positions, head_dim)
        positions = runner._kv.pool[:, own].permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
        kept.append(positions[..., : len(ids) + 1, :])
    assert torch.equal(*kept)
    assert (kept[0] != 0).any(dim=-1).all()


def test_a_step_that_was_given_up_can_be_computed_anew(kernels, calls):
    runner, undisturbed = make_runner(kernels), make_runner(kernels)
    for each in (runner, undisturbed):
        each.run(prefill())
    asked = iter([False, True])
    with pytest.raises(StepYielded):
        runner.run(step(0), lambda: next(asked))
    assert drawn(runner, step(0)) == drawn(undisturbed, step(0))
    assert drawn(runner, step(1)) == drawn(undisturbed, step(1))
    assert calls[2:] == [3] * 5


def test_alone_or_with_others_a_step_has_the_same_tokens(kernels):
    runner, alone = make_runner(kernels), make_runner(kernels)
    for each in (runner, alone):
        each.run(prefill())
    for number in range(10):
        together = drawn(runner, step(number))
        assert [drawn(alone, step(number, indices=(i,)))[0] for i in range(3)] == together


def test_blocks_of_another_size_are_left_to_torch(kernels, calls):
    runner = make_runner(kernels, block_size=8)
    runner.run(Plan((row(0, range(9), 0),)))
    drawn(runner, Plan((row(0, [4], 9),)))
    assert calls == []
