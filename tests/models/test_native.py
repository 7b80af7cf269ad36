"""Our own kernels against exact products, and a decode step by them against the one that torch computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from omnilmm.models import native, packed
from omnilmm.models.adapter_files import AdapterWeights, projection_slots
from omnilmm.models.adapters import AdapterPool, TokenRun
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import LanguageConfig, ModelConfig, read_model_config
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.native import Kernels, NativeLinear, try_kernels
from omnilmm.models.native_decode import NativeDecoder, can_decode
from omnilmm.models.packed import Int8Linear, PackedLinear, can_use_kernels, prepare_for_decoding

BLOCK = 16
CONFIG = LanguageConfig(
    hidden=64,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    mlp_width=96,
    vocab_size=61,
    max_context=128,
    norm_eps=1e-6,
    rope_theta=100.0,
    scale_depth=1.4,
    dim_model_base=16,
)
ENDS = (1, 16, 17, 40, 33)
RANKS = (range(5), None, range(8, 28), range(5), range(5, 8))
"""Rank rows of the sequences' adapters: two have the same, one has none, one more than a vector holds."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = try_kernels()
    if found is None:
        pytest.skip("no compiler, or a CPU without AVX512-BF16 or -VBMI")
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_model(config: LanguageConfig = CONFIG) -> LanguageModel:
    torch.manual_seed(4)
    return LanguageModel(config).to(torch.bfloat16).requires_grad_(False).eval()


def random(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.bfloat16)


# -- products -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_rows", [*range(1, 14), 24, 25, 37, 120])
@pytest.mark.parametrize("num_outputs", [96, 61, 7])
def test_a_product_is_rounded_once(kernels: Kernels, num_rows: int, num_outputs: int) -> None:
    torch.manual_seed(num_rows)
    weight, x, residual = random(num_outputs, 70), random(num_rows, 70), random(num_rows, num_outputs)
    linear = NativeLinear(kernels, weight)
    exact = x.double() @ weight.double().t()
    for out, wanted in ((linear(x), exact), (linear(x, residual), exact + residual.double())):
        assert out.dtype == torch.bfloat16
        assert_close(out.double(), wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 5, 20])
def test_8_bit_weights_are_exact_levels(kernels: Kernels, num_rows: int) -> None:
    torch.manual_seed(num_rows)
    plain = Int8Linear(random(61, 70))
    x, residual = random(num_rows, 70), random(num_rows, 61)
    exact = x.double() @ plain.levels.double().t() * plain.scale.double() + residual.double()
    out = NativeLinear(kernels, plain.levels, plain.scale)(x, residual)
    assert_close(out.double(), exact, rtol=2**-8, atol=1e-3)


def test_a_row_has_the_same_numbers_in_any_company(kernels: Kernels, threads: int) -> None:
    linear, x = NativeLinear(kernels, random(200, 64)), random(130, 64)
    together = linear(x)
    for first, end in ((0, 1), (3, 7), (5, 21), (0, 49)):
        assert torch.equal(linear(x[first:end]), together[first:end])
    torch.set_num_threads(3 - threads)
    assert torch.equal(linear(x), together)


def test_an_input_need_not_lie_in_one_piece(kernels: Kernels) -> None:
    linear, x, residual = NativeLinear(kernels, random(32, 64)), random(64, 9), random(32, 9)
    assert torch.equal(linear(x.t(), residual.t()), linear(x.t().contiguous(), residual.t().contiguous()))


def test_infinity_and_nan_are_not_lost(kernels: Kernels) -> None:
    linear, x = NativeLinear(kernels, random(32, 64).abs()), random(2, 64)
    x[0, 3] = math.nan
    out = linear(x)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


# -- decode steps -------------------------------------------------------------------------------------


def make_adapters(model: LanguageModel, language: LanguageConfig) -> AdapterPool:
    """Three adapters at RANKS, strong ones, and numbers that are none in all rows that are nobody's."""
    folder = Path(__file__).parents[1] / "data" / "minicpm-v-tiny"
    config: ModelConfig = replace(read_model_config(folder), language=language)
    pool = AdapterPool(model, config, num_ranks=40)
    shapes = {name: slot.shape for name, slot in projection_slots(config).items()}

    def put(ranks: range, make) -> None:
        pairs = {name: (make(len(ranks), into), make(len(ranks), out)) for name, (out, into) in shapes.items()}
        pool.write(ranks, AdapterWeights("", len(ranks), pairs))

    put(range(40), lambda *shape: torch.full(shape, math.nan, dtype=torch.bfloat16))
    torch.manual_seed(9)
    for ranks in sorted({ranks for ranks in RANKS if ranks is not None}, key=lambda ranks: ranks.start):
        put(ranks, lambda *shape: random(*shape) / 4)
    return pool


class Steps:
    """Sequences of ENDS[i] tokens each, all but the last in the pool, in blocks that lie anywhere."""

    def __init__(
        self,
        kernels: Kernels,
        config: LanguageConfig = CONFIG,
        weight_dtype: str | None = None,
        *,
        has_adapters: bool = False,
    ) -> None:
        self.model = prepare_for_decoding(make_model(config), weight_dtype=weight_dtype, kernels=kernels)
        pool_shape = (config.num_layers, 40, 2, config.num_kv_heads, BLOCK, config.head_dim)
        self.pool = torch.full(pool_shape, math.nan, dtype=torch.bfloat16)  # of somebody else, not to be read
        self.adapters = make_adapters(self.model, config) if has_adapters else None
        self.decoder = NativeDecoder(self.model, kernels, self.pool, self.adapters)
        self.block_ids = np.random.default_rng(1).permutation(40).reshape(8, 5).astype(np.int32)
        self.wanted = torch.cat([self._fill(row, end) for row, end in enumerate(ENDS)])

    def _ids(self, row: int, end: int) -> Tensor:
        return torch.arange(end) * (row + 3) % 61

    def _fill(self, row: int, end: int) -> Tensor:
        """Compute the sequence by torch, and put the past into the pool: what its last token becomes, (1, hidden)."""
        ids, dense = self._ids(row, end), DenseAttend(self.pool.shape[0])
        runs = [TokenRun(0, end, RANKS[row])]
        with nullcontext() if self.adapters is None else self.adapters.acting(runs):
            hidden = self.model(self.model.embed(ids), torch.arange(end), dense)
        for position in range(end - 1):
            page = int(self.block_ids[row, position // BLOCK])
            for layer, (keys, values) in enumerate(zip(dense._keys, dense._values, strict=True)):
                assert keys is not None
                assert values is not None
                self.pool[layer, page, 0, :, position % BLOCK] = keys[:, position]
                self.pool[layer, page, 1, :, position % BLOCK] = values[:, position]
        return hidden[-1:]

    def decode(self, *rows: int) -> Tensor:
        ends = np.array([ENDS[row] for row in rows], dtype=np.int32)
        ids = torch.stack([self._ids(row, ENDS[row])[-1] for row in rows])
        positions = torch.from_numpy(ends).long() - 1
        ranks = None
        if self.adapters is not None:
            own = [RANKS[row] or range(0) for row in rows]
            ranks = np.array([(each.start, len(each)) for each in own], dtype=np.int32)
        blocks = self.block_ids[list(rows)]
        return self.decoder.decode(self.model.embed(ids), positions, blocks, ends, ranks=ranks)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, scale_depth=None), replace(CONFIG, num_heads=24), replace(CONFIG, num_kv_heads=6)],
    ids=["three heads a key head", "no residual scale", "twelve", "one"],
)
def test_a_step_is_what_torch_computes(kernels: Kernels, config: LanguageConfig, weight_dtype: str | None) -> None:
    steps = Steps(kernels, config, weight_dtype)
    out = steps.decode(*range(len(ENDS)))
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), steps.wanted.float(), rtol=0, atol=0.04 * steps.wanted.abs().max().item())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, scale_depth=None), replace(CONFIG, num_kv_heads=6)],
    ids=["three heads a key head", "no residual scale", "one"],
)
def test_every_sequence_has_its_own_adapter(kernels: Kernels, config: LanguageConfig) -> None:
    steps = Steps(kernels, config, has_adapters=True)
    out, bare = steps.decode(*range(len(ENDS))), Steps(kernels, config).wanted
    assert_close(out.float(), steps.wanted.float(), rtol=0, atol=0.04 * steps.wanted.abs().max().item())
    apart = (steps.wanted - bare).abs().amax(1) > 0.08 * bare.abs().max()
    assert apart.tolist() == [ranks is not None for ranks in RANKS], "or the adapters prove nothing"


def test_a_sequence_with_an_adapter_has_the_same_numbers_in_any_company(kernels: Kernels, threads: int) -> None:
    steps = Steps(kernels, has_adapters=True)
    together = steps.decode(*range(len(ENDS)))
    assert torch.equal(together[1], Steps(kernels).decode(1)[0]), "beside adapters the model is as it was"
    torch.set_num_threads(3 - threads)
    for row in range(len(ENDS)):
        assert torch.equal(steps.decode(row)[0], together[row])


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_heads_may_be_of_any_fit_width(kernels: Kernels, head_dim: int) -> None:
    steps = Steps(kernels, replace(CONFIG, head_dim=head_dim))
    out = steps.decode(3, 4)
    assert_close(out.float(), steps.wanted[3:].float(), rtol=0, atol=0.04 * steps.wanted.abs().max().item())


def test_a_sequence_has_the_same_numbers_in_any_company(kernels: Kernels, threads: int) -> None:
    steps = Steps(kernels)
    together = steps.decode(*range(len(ENDS)))
    torch.set_num_threads(3 - threads)
    for row in range(len(ENDS)):
        assert torch.equal(steps.decode(row)[0], together[row])
    assert torch.equal(steps.decode(4, 1), together[[4, 1]])


def test_a_step_writes_its_own_positions_only(kernels: Kernels) -> None:
    steps = Steps(kernels)
    before = steps.pool.clone()
    steps.decode(1, 3)
    written = {(int(steps.block_ids[row, (ENDS[row] - 1) // BLOCK]), (ENDS[row] - 1) % BLOCK) for row in (1, 3)}
    changed = (steps.pool.view(torch.int16) != before.view(torch.int16)).any(dim=-1).nonzero().tolist()
    assert {(page, offset) for _, page, _, _, offset in changed} == written
    assert len(changed) == len(written) * 2 * CONFIG.num_layers * CONFIG.num_kv_heads
    assert all(steps.pool[:, page, :, :, offset].isfinite().all() for page, offset in written)


def test_a_number_that_is_lost_is_seen(kernels: Kernels) -> None:
    """One of the past's keys is not a number: its own sequence alone becomes so."""
    steps = Steps(kernels)
    steps.pool[0, int(steps.block_ids[3, 0]), 0, :, 5] = math.nan
    out = steps.decode(3, 4)
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


def test_somebody_may_step_in_before_every_layer(kernels: Kernels) -> None:
    steps, calls = Steps(kernels), []

    def second_time() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    embeds, one = steps.model.embed(torch.tensor([1])), np.ones(1, dtype=np.int32)
    with pytest.raises(InterruptedError):
        steps.decoder.decode(embeds, torch.tensor([0]), steps.block_ids[:1], one, before_layer=second_time)
    assert len(calls) == 2


# -- chunks of prompts --------------------------------------------------------------------------------


def chunks(steps: Steps, *parts: tuple[int, int, int]) -> Tensor:
    """A step of parts (row, start, end), whose tokens are computed together."""
    tokens = [(index, position) for index, (_, start, end) in enumerate(parts) for position in range(start, end)]
    ids = torch.cat([steps._ids(row, end)[start:] for row, start, end in parts])
    positions = torch.tensor([position for _, position in tokens])
    blocks = steps.block_ids[[row for row, _, _ in parts]]
    ends = positions.numpy().astype(np.int32) + 1
    sequences = np.array([index for index, _ in tokens], dtype=np.int32)
    ranks = None
    if steps.adapters is not None:
        own = [RANKS[row] or range(0) for row, _, _ in parts]
        ranks = np.array([(each.start, len(each)) for each in own], dtype=np.int32)[sequences]
    return steps.decoder.decode(steps.model.embed(ids), positions, blocks, ends, sequences=sequences, ranks=ranks)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("num_heads", "has_adapters"), [(2, False), (6, False), (10, False), (24, False), (6, True)])
def test_a_chunk_is_what_torch_computes(kernels: Kernels, num_heads: int, has_adapters: bool) -> None:
    steps = Steps(kernels, replace(CONFIG, num_heads=num_heads), has_adapters=has_adapters)
    steps.pool.fill_(math.nan)
    out = chunks(steps, (3, 0, ENDS[3]), (1, 0, ENDS[1]), (4, 0, ENDS[4]))
    lasts = np.cumsum([ENDS[3], ENDS[1], ENDS[4]]) - 1
    wanted = steps.wanted[[3, 1, 4]].float()
    assert_close(out[lasts].float(), wanted, rtol=0, atol=0.04 * steps.wanted.abs().max().item())


def test_of_a_long_sequence_heads_are_read_one_after_another(kernels: Kernels) -> None:
    """30 heads share a key head, and their scores with 600 positions do not stay in the caches for both key heads."""
    config = replace(CONFIG, num_heads=60, num_kv_heads=2, max_context=600)
    steps = Steps(kernels, config)
    steps.block_ids = np.random.default_rng(2).permutation(40).reshape(1, 40).astype(np.int32)
    steps.pool.fill_(math.nan)
    out = torch.cat([chunks(steps, (0, 0, 599)), chunks(steps, (0, 599, 600))])
    wanted = steps.model(steps.model.embed(steps._ids(0, 600)), torch.arange(600), DenseAttend(config.num_layers))
    assert_close(out.float(), wanted.float(), rtol=0, atol=0.04 * wanted.abs().max().item())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("num_heads", "has_adapters"), [(2, False), (6, False), (6, True)])
def test_a_sequence_has_the_same_numbers_in_any_pieces(kernels: Kernels, num_heads: int, has_adapters: bool) -> None:
    steps = Steps(kernels, replace(CONFIG, num_heads=num_heads), has_adapters=has_adapters)
    steps.pool.fill_(math.nan)
    whole = chunks(steps, (3, 0, 40))
    after = steps.pool.clone()
    for cuts in ((0, 1, 40), (0, 39, 40), (0, 7, 16, 17, 32, 40), tuple(range(41))):
        steps.pool.fill_(math.nan)
        pieces = []
        for start, end in pairwise(cuts):
            beside = [(4, 0, 20)] if start % 2 else []
            pieces.append(chunks(steps, *beside, (3, start, end))[-(end - start) :])
        assert torch.equal(torch.cat(pieces), whole)
        own = steps.block_ids[3, :3]
        assert torch.equal(steps.pool[:, own, ..., :8, :], after[:, own, ..., :8, :])


# -- who gets them ------------------------------------------------------------------------------------


def test_models_that_are_not_fit(kernels: Kernels) -> None:
    assert can_use_kernels(make_model())
    assert not can_use_kernels(make_model().float())
    assert not can_use_kernels(make_model().half())
    for changed in ({"hidden": 48}, {"mlp_width": 80}, {"head_dim": 16}):
        assert not can_use_kernels(make_model(replace(CONFIG, **changed)))
    with pytest.raises(AssertionError):
        prepare_for_decoding(make_model().float(), kernels=kernels)


def test_pools_that_are_not_fit(kernels: Kernels) -> None:
    model = prepare_for_decoding(make_model(), kernels=kernels)
    pool = torch.zeros(2, 3, 2, 2, BLOCK, 32, dtype=torch.bfloat16)
    assert can_decode(model, pool)
    assert not can_decode(model, pool.float())
    assert not can_decode(model, pool[:, :, :, :, :8].contiguous())
    assert not can_decode(prepare_for_decoding(make_model()), pool)
    assert not can_decode(make_model(), pool)


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert try_kernels() is None


def test_on_another_cpu_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "can_compute", lambda: False)
    monkeypatch.setattr(packed, "can_compute", lambda: False)
    assert try_kernels() is None
    assert not can_use_kernels(make_model())


def test_a_compiler_that_fails_does_no_harm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: "/bin/false")
    monkeypatch.setattr(native, "can_compute", lambda: True)
    assert try_kernels() is None
    assert "could not be compiled" in caplog.text


def test_without_kernels_the_model_is_packed_as_ever() -> None:
    model = prepare_for_decoding(make_model())
    assert model.kernels is None
    assert not any(isinstance(module, NativeLinear) for module in model.modules())
    assert isinstance(model.layers[0].attention.qkv, PackedLinear | torch.nn.Linear)
