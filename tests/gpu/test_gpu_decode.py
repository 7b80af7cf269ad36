"""The paged backend and captured decode steps on CUDA, against the same model on CPU in float32."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch.testing import assert_close

from omnilmm.config import EngineConfig
from omnilmm.engine.backend import Backend, pick_backend
from omnilmm.engine.batch import GatheredAttend, GatheredAttention, build_batch
from omnilmm.engine.engine import Engine, Tokens
from omnilmm.engine.kv import PagedKV
from omnilmm.engine.paged import PagedAttention
from omnilmm.engine.plan import Row
from omnilmm.engine.runner import ModelRunner
from omnilmm.messages import GenerateCall, Prompt, Sampling

pytestmark = pytest.mark.gpu

CONFIG = EngineConfig(num_blocks=256, block_size=16, max_step_tokens=512, max_sequences=12, max_context=1024)
CUDA = torch.device("cuda", 0)


def make_rows(seed: int, longest_chunk: int) -> list[Row]:
    source = random.Random(seed)
    free = list(range(CONFIG.num_blocks))
    source.shuffle(free)
    rows = []
    for index in range(7):
        start = source.choice([0, 1, 15, 16, source.randrange(200)])
        count = source.choice([1, 1, 1, source.randrange(1, longest_chunk)])
        block_ids = tuple(free.pop() for _ in range(-(-(start + count) // CONFIG.block_size)))
        rows.append(Row(index, tuple(source.randrange(301) for _ in range(count)), start, block_ids))
    return rows


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_paged_attention_reads_what_gathered_attention_reads(wide_model, block_size, dtype, tolerance):
    model = wide_model.config
    config = CONFIG.resolve(block_size=block_size)
    backend = PagedAttention(config)
    for seed in range(4):
        rows = make_rows(seed, longest_chunk=300)
        rows = [Row(r.sequence_id, r.ids, r.start, r.block_ids[: -(-r.end // block_size)]) for r in rows]
        used = sorted({block_id for row in rows for block_id in row.block_ids})
        pools = []
        for _ in range(2):
            kv = PagedKV(config, model, dtype=dtype, device=CUDA)
            kv._pool.fill_(torch.nan)  # whatever is read of a block that nobody owns shows
            generator = torch.Generator(CUDA).manual_seed(seed)
            shape = (model.num_layers, len(used), *kv._pool.shape[2:])
            kv._pool[:, used] = torch.randn(shape, generator=generator, device=CUDA, dtype=dtype)
            pools.append(kv)
        batch = build_batch(rows, block_size=block_size, device=CUDA)
        attends = [GatheredAttend(batch, pools[0]), backend(batch, pools[1])]
        for layer in range(model.num_layers):
            q, k, v = (
                torch.randn(len(batch.ids), heads, model.head_dim, device=CUDA, dtype=dtype)
                for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
            )
            gathered, paged = (attend(layer, q, k, v) for attend in attends)
            assert_close(paged, gathered, atol=tolerance, rtol=tolerance)


def generate(model, backend: Backend | None, *, num_calls: int = 9) -> list[tuple[int, ...]]:
    """Greedy answers of several lengths at once: chunks, mixed steps, decodes of falling number."""
    engine = Engine(ModelRunner(model, CONFIG, backend=backend), CONFIG)
    answers: dict[int, tuple[int, ...]] = {}
    for index in range(num_calls):
        source = random.Random(index)
        ids = tuple(source.randrange(301) for _ in range(5 + 37 * index))
        call = GenerateCall(f"r{index}", Prompt(ids, (), ()), (), Sampling(max_tokens=6 + 5 * index))
        answers[engine.submit(call).sequence_id] = ()
    while engine.has_work:
        for output in engine.step():
            assert isinstance(output, Tokens)
            answers[output.sequence_id] += output.batch.ids
    engine.check_integrity()
    return list(answers.values())


def test_the_tokens_are_those_of_the_cpu(wide_model):
    on_cpu = generate(wide_model, None)
    on_cuda = copy.deepcopy(wide_model).to(CUDA)
    chosen = pick_backend(CONFIG, wide_model.config, CUDA)
    assert isinstance(chosen.attend, PagedAttention)
    assert chosen.has_graphs
    assert generate(on_cuda, None) == on_cpu  # paged with graphs, chosen by itself
    assert generate(on_cuda, Backend(PagedAttention(CONFIG))) == on_cpu
    assert generate(on_cuda, Backend(GatheredAttention())) == on_cpu


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8, 12])
def test_a_replay_is_the_step_it_recorded(wide_model, num_rows):
    """And touches no slot but its own rows' and the scratch block's, with NaN in every block that nobody owns."""
    model = copy.deepcopy(wide_model).to(CUDA)
    rows = [Row(i, (i + 3,), 5 + 16 * i, tuple(range(12 * i, 12 * i + i + 1))) for i in range(num_rows)]
    used = sorted({block_id for row in rows for block_id in row.block_ids})
    results, pools = [], []
    for record in (None, lambda step: step):
        backend = Backend(PagedAttention(CONFIG), has_graphs=True, record=record)
        kv = backend.pool(CONFIG, model.config, dtype=torch.float32, device=CUDA)
        graphs = backend.prepare(model, kv, CONFIG)
        assert graphs is not None
        kv._pool[:, : CONFIG.num_blocks] = torch.nan
        kv._pool[:, used] = torch.randn(
            (model.config.num_layers, len(used), *kv._pool.shape[2:]),
            generator=torch.Generator(CUDA).manual_seed(5),
            device=CUDA,
        )
        batch = build_batch(rows, block_size=CONFIG.block_size, device=torch.device("cpu"))
        for _ in range(3):  # the same numbers again: a replay starts from nothing of the last one
            hidden, _ = graphs.run(batch)
        results.append(hidden.clone())
        pools.append(kv._pool[:, : CONFIG.num_blocks].clone())
    assert results[0].isfinite().all()
    assert_close(results[0], results[1], atol=1e-5, rtol=0)
    assert_close(pools[0], pools[1], atol=1e-5, rtol=0, equal_nan=True)
    foreign = [block_id for block_id in range(CONFIG.num_blocks) if block_id not in used]
    assert pools[0][:, foreign].isnan().all()


def test_weights_go_to_the_device_and_not_through_a_copy_on_the_host(data):
    """The model on CUDA is the model on CPU. `fill` gives memory on the device and copies tensor by tensor."""
    from omnilmm.models.config import read_model_config
    from omnilmm.models.packed import load_for_decoding

    folder = data / "minicpm-v-tiny"
    config = read_model_config(folder)
    there = load_for_decoding(folder, config, dtype="float32", device="cuda")
    here = load_for_decoding(folder, config, dtype="float32")
    for name, parameter in there.named_parameters():
        assert parameter.device.type == "cuda"
        assert torch.equal(parameter.cpu(), here.get_parameter(name))
