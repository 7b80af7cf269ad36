"""Adapters: what a file may say, and what they add to the products of a model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnilmm.errors import CheckpointError
from omnilmm.models.adapter_files import (
    CONFIG_FILE,
    PICKLED_FILE,
    WEIGHTS_FILE,
    AdapterCatalog,
    AdapterWeights,
    read_adapter,
)
from omnilmm.models.adapter_products import Pairs
from omnilmm.models.adapters import FEW, GAP, PACK_AFTER, AdapterPool, TokenRun
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.packed import prepare_for_decoding
from omnilmm.models.weights import load_language_model
from omnilmm.training.config import LoraConfig
from omnilmm.training.lora import Adapter

FAMILIES = ["omnilmm-12b-tiny", "minicpm-v-tiny"]
RANK = 3


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(__file__).parents[1] / "data" / request.param


@pytest.fixture
def config(folder: Path) -> ModelConfig:
    return read_model_config(folder)


def make_adapter(config: ModelConfig, seed: int = 1, lora: LoraConfig | None = None) -> Adapter:
    torch.manual_seed(seed)
    adapter = Adapter(config, lora or LoraConfig(r=RANK, lora_alpha=7.0))
    for up in adapter.up:
        torch.nn.init.normal_(up, std=0.2)
    return adapter.requires_grad_(False)


@pytest.fixture
def stored(config: ModelConfig, tmp_path: Path) -> Path:
    make_adapter(config).save(tmp_path, base="somewhere")
    return tmp_path


def read(folder: Path, config: ModelConfig, **settings: Any) -> Any:
    return read_adapter(folder, config, **({"max_rank": 8, "dtype": torch.float32} | settings))


# -- files ------------------------------------------------------------------------------------------------


def test_what_training_saves_is_read(stored: Path, config: ModelConfig) -> None:
    weights = read(stored, config)
    assert weights.rank == RANK
    for slot, down, up in zip((a := make_adapter(config)).slots, a.down, a.up, strict=True):
        read_down, read_up = weights.pairs[slot.name.removesuffix(".weight").removeprefix("llm.")]
        assert torch.equal(read_down, down)
        torch.testing.assert_close(read_up, up.t() * a.lora.scale)


def test_the_digest_is_of_what_is_in_it(stored: Path, config: ModelConfig) -> None:
    before = read(stored, config).digest
    assert read(stored, config).digest == before
    change_config(stored, lora_alpha=8.0)
    assert read(stored, config).digest != before


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 9},
        {"r": 10**6},
        {"r": 0},
        {"r": True},
        {"r": "3"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "7"},
        {"target_modules": "all-linear"},
        {"target_modules": []},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"]},  # the others' tensors are then unknown
        {"bias": "all"},
        {"use_dora": True},
        {"peft_type": "IA3"},
        {"rank_pattern": {"q_proj": 1}},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_settings_that_mean_something_else_are_refused(
    changes: dict[str, Any], stored: Path, config: ModelConfig
) -> None:
    change_config(stored, **changes)
    with pytest.raises(CheckpointError):
        read(stored, config)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def some(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(some(t)),
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(1)}),
        lambda t: t.update({some(t): t[some(t)].t().contiguous()}),
        lambda t: t.update({some(t): t[some(t)][:-1].contiguous()}),
        lambda t: t.update({some(t): t[some(t)].to(torch.float64)}),
        lambda t: t.update({some(t): t[some(t)].to(torch.int8)}),
        lambda t: t[some(t)].fill_(float("nan")),
        lambda t: t[some(t)].fill_(float("inf")),
        lambda t: t.update({some(t).removeprefix("base_model.model."): t[some(t)].clone()}),
    ],
    ids=["missing", "unknown", "turned", "short", "float64", "int8", "nan", "inf", "twice"],
)
def test_tensors_that_do_not_fit_are_refused(change: Any, stored: Path, config: ModelConfig) -> None:
    rewrite(stored, change)
    with pytest.raises(CheckpointError):
        read(stored, config)


def reheader(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def claim(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[min(set(header) - {"__metadata__"})].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        claim(data_offsets=[0, 100 * 10**9]),
        claim(data_offsets=[-4, 0]),
        claim(data_offsets=[4, 8]),
        claim(shape=[10**9, 10**9]),
        claim(shape=[True, 1]),
        claim(shape="many"),
        claim(dtype="F64"),
        claim(dtype=["F32"]),
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_loaded(
    change: Any, stored: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(data: bytes) -> None:
        raise AssertionError("the numbers were touched")

    monkeypatch.setattr("omnilmm.models.adapter_files._load", never)
    reheader(stored, change)
    with pytest.raises(CheckpointError):
        read(stored, config)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: struct.pack("<Q", 10**9) + data[8:],
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: struct.pack("<Q", 60_000) + b"[" * 60_000,
        lambda data: data + bytes(10**7),
    ],
)
def test_files_of_another_length_are_refused(change: Any, stored: Path, config: ModelConfig) -> None:
    path = stored / WEIGHTS_FILE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError):
        read(stored, config)


def test_pickles_and_links_are_not_read(stored: Path, config: ModelConfig, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (stored / WEIGHTS_FILE).rename(elsewhere)
    (stored / PICKLED_FILE).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickle"):
        read(stored, config)
    (stored / WEIGHTS_FILE).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="link"):
        read(stored, config)


def test_a_catalog_knows_its_own_folders_only(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a", root / ".hidden", outside):
        folder.mkdir(parents=True)
    (root / "link").symlink_to(outside)
    (root / "file").write_text("")
    catalog = AdapterCatalog(root, {"b": outside})
    assert catalog.names() == ("a", "b")
    assert (catalog.find("a"), catalog.find("b")) == (root / "a", outside)
    for name in ("../outside", "link", "file", ".hidden", "..", "", "a/../a", "c"):
        assert catalog.find(name) is None


# -- products ---------------------------------------------------------------------------------------------


def hidden(model: LanguageModel, num_tokens: int) -> torch.Tensor:
    """Of tokens that see one another."""
    ids = torch.arange(5, 5 + num_tokens)
    return model(model.embed(ids), torch.arange(num_tokens), DenseAttend(model.config.num_layers))


def alone(model: LanguageModel, num_tokens: int) -> torch.Tensor:
    """Of tokens that see nothing but themselves: every one a sequence."""
    ids = torch.arange(5, 5 + num_tokens)
    return model(
        model.embed(ids),
        torch.zeros(num_tokens, dtype=torch.int64),
        lambda layer, q, k, v: v.repeat_interleave(q.shape[1] // v.shape[1], 1),
    )


@pytest.mark.parametrize("targets", [None, ("k_proj", "down_proj"), ("q_proj", "v_proj"), ("up_proj",)])
@pytest.mark.parametrize("num_tokens", [6, FEW + 6])
def test_acting_is_as_merging(
    targets: tuple[str, ...] | None, num_tokens: int, folder: Path, config: ModelConfig, tmp_path: Path
) -> None:
    lora = LoraConfig(r=RANK, lora_alpha=7.0, use_rslora=True, **({"target_modules": targets} if targets else {}))
    adapter = make_adapter(config, lora=lora)
    adapter.save(tmp_path, base="somewhere")
    model, merged = (load_language_model(folder, config, dtype="float32") for _ in range(2))
    adapter.merge_into(merged)
    plain = hidden(model, num_tokens)
    pool = AdapterPool(model, config, num_ranks=8)
    pool.write(range(2, 8), _widest(read(stored_all(config, tmp_path / "other"), config)))  # what was there before
    ranks = range(2, 2 + RANK)
    pool.write(ranks, read(tmp_path, config))
    with pool.acting([TokenRun(0, num_tokens, ranks)]):
        acting = hidden(model, num_tokens)
    assert not torch.allclose(plain, acting, atol=1e-2)
    torch.testing.assert_close(acting, hidden(merged, num_tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(hidden(model, num_tokens), plain)


def stored_all(config: ModelConfig, folder: Path) -> Path:
    folder.mkdir()
    make_adapter(config, 9, LoraConfig(r=6)).save(folder, base="")
    return folder


def _widest(weights: Any) -> Any:
    assert weights.rank == 6
    return weights


@pytest.mark.parametrize("gap", [0, GAP + 1])
def test_neighbours_do_not_disturb_one_another(gap: int, folder: Path, config: ModelConfig, tmp_path: Path) -> None:
    model = load_language_model(folder, config, dtype="float32")
    plain = alone(model, 8)
    pool = AdapterPool(model, config, num_ranks=2 * RANK + gap)
    ranks = [range(RANK), range(RANK + gap, 2 * RANK + gap)]
    merged = []
    for seed, rows in enumerate(ranks):
        (tmp_path / str(seed)).mkdir()
        adapter = make_adapter(config, seed)
        adapter.save(tmp_path / str(seed), base="")
        pool.write(rows, read(tmp_path / str(seed), config))
        other = load_language_model(folder, config, dtype="float32")
        adapter.merge_into(other)
        merged.append(alone(other, 8))
    runs = [TokenRun(0, 2, ranks[1]), TokenRun(2, 5, None), TokenRun(5, 6, ranks[0]), TokenRun(6, 7, ranks[1])]
    with pool.acting([*runs, TokenRun(7, 8, None)]):
        out = alone(model, 8)
    for first, end, expected in ((0, 2, merged[1]), (5, 6, merged[0]), (6, 7, merged[1])):
        torch.testing.assert_close(out[first:end], expected[first:end], rtol=1e-4, atol=1e-4)
    for first, end in ((2, 5), (7, 8)):
        assert torch.equal(out[first:end], plain[first:end])


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_it_acts_on_packed_weights_too(weight_dtype: Any, folder: Path, config: ModelConfig, stored: Path) -> None:
    model = load_language_model(folder, config, dtype="bfloat16")
    merged = load_language_model(folder, config, dtype="bfloat16")
    make_adapter(config).merge_into(merged)
    expected = hidden(merged, 6).float()
    prepare_for_decoding(model, weight_dtype=weight_dtype)
    pool = AdapterPool(model, config, num_ranks=RANK)
    pool.write(range(RANK), read(stored, config, dtype=torch.bfloat16))
    plain = hidden(model, 6).float()
    with pool.acting([TokenRun(0, 6, range(RANK))]):
        acting = hidden(model, 6).float()
    assert (acting - expected).norm() < 0.3 * (plain - expected).norm()
    pool.close()


class Packs:
    """A packed model, and a pool with `num` adapters in it, of which steps use what `step` names."""

    def __init__(self, folder: Path, config: ModelConfig, tmp_path: Path, num: int) -> None:
        self.config, self.tmp_path = config, tmp_path
        self.model = prepare_for_decoding(load_language_model(folder, config, dtype="bfloat16"))
        self.pool = AdapterPool(self.model, config, num_ranks=num * RANK)
        for index in range(num):
            self.write(index, seed=index)

    def write(self, index: int, *, seed: int) -> None:
        folder = self.tmp_path / f"{index} {seed}"
        folder.mkdir()
        make_adapter(self.config, seed).save(folder, base="")
        self.pool.write(self.rows(index), read(folder, self.config, dtype=torch.bfloat16))

    def rows(self, index: int) -> range:
        return range(index * RANK, (index + 1) * RANK)

    def step(self, *used: int) -> torch.Tensor:
        with self.pool.acting([TokenRun(i, i + 1, self.rows(index)) for i, index in enumerate(used)]):
            return alone(self.model, len(used)).float()

    @property
    def whole(self) -> slice | None:
        return None if self.pool._packed is None else self.pool._packed[0]


@pytest.fixture
def packs(folder: Path, config: ModelConfig, tmp_path: Path) -> Packs:
    made = Packs(folder, config, tmp_path, num=4)
    if not made.pool._packs:
        pytest.skip("nothing is packed on this machine")
    return made


def test_what_steps_use_again_and_again_is_packed_and_says_the_same(packs: Packs) -> None:
    orders = [(0, 1, 2, 3), (0, 2, 1, 3)]
    before = [packs.step(*order) for order in orders]
    assert packs.whole is None
    for turn in range(PACK_AFTER):
        packs.step(*orders[turn % 2])
    assert packs.whole == slice(0, 4 * RANK)
    for order, expected in zip(orders, before, strict=True):
        torch.testing.assert_close(packs.step(*order), expected, rtol=0.05, atol=0.05)
    smaller = packs.step(1, 2)  # half of it, so the copy serves
    assert packs.pool._last[2][0].layers is packs.pool._packed[2]  # type: ignore[index]
    torch.testing.assert_close(smaller[0], packs.step(1, 2, 1, 2)[0], rtol=0.05, atol=0.05)


def test_a_copy_never_outlives_what_it_is_of(packs: Packs) -> None:
    order, other = (0, 1, 2, 3), (3, 2, 1, 0)
    for _ in range(PACK_AFTER):
        packs.step(*order)
        packs.step(*other)
    before = packs.step(*order)
    assert packs.whole is not None
    packs.write(1, seed=9)
    after = packs.step(*order)  # the very same runs, with another adapter in one's rows
    assert not torch.allclose(after[1], before[1], atol=0.1)
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], rtol=0.05, atol=0.05)
    for _ in range(PACK_AFTER):
        packs.step(*other)
        packs.step(*order)
    assert packs.pool._packed is not None
    torch.testing.assert_close(packs.step(*order), after, rtol=0.05, atol=0.05)


def test_a_copy_begun_while_rows_are_written_is_not_kept(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Pairs.packed_rows

    def interrupted(pairs: Pairs, ranks: slice) -> Any:
        packs.pool._num_writes += 2  # another thread's write began and ended
        return real(pairs, ranks)

    monkeypatch.setattr(Pairs, "packed_rows", interrupted)
    for turn in range(3 * PACK_AFTER):
        packs.step(*((0, 1, 2, 3), (3, 2, 1, 0))[turn % 2])
    assert packs.whole is None


def test_a_foreign_adapter_s_overflow_stays_its_own(folder: Path, config: ModelConfig, stored: Path) -> None:
    model = load_language_model(folder, config, dtype="float32")
    pool = AdapterPool(model, config, num_ranks=2 * RANK)
    weights = read(stored, config)
    pool.write(range(RANK), weights)
    with pool.acting([TokenRun(0, 1, range(RANK)), TokenRun(1, 2, None)]):
        expected = alone(model, 2)
    pairs = {name: (torch.full_like(down, 3e38), up) for name, (down, up) in weights.pairs.items()}
    pool.write(range(RANK, 2 * RANK), AdapterWeights("", RANK, pairs))
    with pool.acting([TokenRun(0, 1, range(RANK)), TokenRun(1, 2, None), TokenRun(2, 3, range(RANK, 2 * RANK))]):
        out = alone(model, 3)
    assert not out[2].isfinite().all()
    torch.testing.assert_close(out[:2], expected, rtol=1e-4, atol=1e-4)
