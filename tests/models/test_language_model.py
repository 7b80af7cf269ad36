"""The language model against the goldens of both families, and against transformers for plain text models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers import MistralForCausalLM as Mistral

from omnilmm.models.attention import DenseAttend, attention_reference
from omnilmm.models.config import LanguageConfig, read_model_config
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.weights import load_language_model

BOS = 1


def generate(reference: Any, case: dict[str, Any], *, penalty: float = 1.0, eos_id: int | None = None) -> Any:
    """Greedy decoding as the original does it: (ids behind a lone BOS, processed scores at every step)."""
    model = reference.language_model
    hidden, attend = reference.prefill(reference.embeds(case))
    ids, scores = [BOS], []
    while len(ids) <= 24 and ids[-1] != eos_id:
        row = model.logits(hidden[-1:])[0]
        seen = torch.tensor(sorted(set(ids)))  # the prompt itself is not penalised
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        scores.append(row)
        ids.append(int(row.argmax()))
        step = model.embed(torch.tensor(ids[-1:]))
        hidden = model(step, torch.tensor([len(attend)]), attend)
    return ids, scores


def test_merged_embeddings_of_every_case(reference: Any, case: dict[str, Any]) -> None:
    embeds, golden = reference.embeds(case), case["inputs_embeds"]
    assert list(embeds.shape) == golden["shape"]
    assert embeds.mean().item() == pytest.approx(golden["mean"], abs=1e-5)
    assert embeds.std(correction=0).item() == pytest.approx(golden["std"], abs=1e-5)
    assert embeds.min().item() == pytest.approx(golden["min"], abs=1e-4)
    assert embeds.max().item() == pytest.approx(golden["max"], abs=1e-4)
    assert embeds.double().norm().item() == pytest.approx(golden["l2"], rel=1e-5)


def test_every_number_of_one_case(reference: Any) -> None:
    case, name = reference.full_case, reference.goldens["full_case"]
    embeds = reference.embeds(case)
    assert_close(embeds, reference.tensors[f"{name}.inputs_embeds"], atol=1e-4, rtol=0)

    states = [embeds[-1]]
    layers = reference.language_model.layers
    hooks = [layer.register_forward_hook(lambda *call: states.append(call[2][-1])) for layer in layers]
    hidden, _ = reference.prefill(embeds)
    for hook in hooks:
        hook.remove()
    states[-1] = hidden[-1]  # the goldens have the final norm in place of the last layer
    assert_close(torch.stack(states), reference.tensors[f"{name}.hidden_states_last_position"], atol=3e-4, rtol=0)


def test_logits_behind_the_prompt(reference: Any, case: dict[str, Any]) -> None:
    hidden, _ = reference.prefill(reference.embeds(case))
    logits = reference.language_model.logits(hidden[-1:])[0]
    assert logits.dtype == torch.float32
    assert_close(logits, reference.tensors[f"{_name(case)}.logits_last"], atol=3e-4, rtol=0)


def test_greedy_answers(reference: Any, case: dict[str, Any]) -> None:
    ids, scores = generate(reference, case)
    assert ids == case["greedy"]["sequence_ids"]
    gaps = torch.stack([top[0] - top[1] for top in (row.topk(2).values for row in scores)])
    assert_close(gaps, reference.tensors[f"{_name(case)}.greedy_scores_topgap"], atol=6e-4, rtol=0)


def test_greedy_answers_with_penalty(reference: Any, case: dict[str, Any]) -> None:
    golden = case["greedy_reppen"]
    ids, scores = generate(reference, case, penalty=golden["repetition_penalty"])
    assert ids == golden["sequence_ids"]
    assert_close(scores[6], reference.tensors[f"{_name(case)}.greedy_reppen_scores_step6"], atol=4e-4, rtol=0)


def test_greedy_answers_end_at_the_end_token(reference: Any, case: dict[str, Any]) -> None:
    golden = case["greedy_eos"]
    ids, _ = generate(reference, case, eos_id=golden["eos_token_id"])
    assert ids == golden["sequence_ids"]


def _name(case: dict[str, Any]) -> str:
    return f"{case['image']}|{case['conversation']}"


# -- the flat interface -------------------------------------------------------------------------------


class SideBySide:
    """Two sequences in one step: the first `split` tokens belong to one memory, the rest to the other."""

    def __init__(self, split: int, first: DenseAttend, second: DenseAttend) -> None:
        self.split, self.first, self.second = split, first, second

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q1, k1, v1), (q2, k2, v2) = zip(*((x[: self.split], x[self.split :]) for x in (q, k, v)), strict=True)
        return torch.cat((self.first(layer, q1, k1, v1), self.second(layer, q2, k2, v2)))


def test_sequences_side_by_side_do_not_meet(reference: Any) -> None:
    model, num_layers = reference.language_model, reference.config.language.num_layers
    long, short = torch.arange(10, 40), torch.arange(100, 107)
    attend = SideBySide(30, DenseAttend(num_layers), DenseAttend(num_layers))
    positions = torch.cat((torch.arange(30), torch.arange(7)))
    together = model(model.embed(torch.cat((long, short))), positions, attend)
    assert_close(together[:30], reference.prefill(model.embed(long))[0], atol=2e-5, rtol=0)
    assert_close(together[30:], reference.prefill(model.embed(short))[0], atol=2e-5, rtol=0)


def test_a_prompt_may_be_paid_in_pieces(reference: Any) -> None:
    model = reference.language_model
    embeds = reference.embeds(reference.full_case)
    attend, pieces, start = DenseAttend(reference.config.language.num_layers), [], 0
    for piece in embeds.split((5, 1, 40, len(embeds) - 46)):
        pieces.append(model(piece, torch.arange(start, start + len(piece)), attend))
        start += len(piece)
    assert_close(torch.cat(pieces), reference.prefill(embeds)[0], atol=2e-5, rtol=0)


def test_attention_backends_give_the_same_logits(reference: Any) -> None:
    model, embeds = reference.language_model, reference.embeds(reference.full_case)
    attend = DenseAttend(reference.config.language.num_layers, attention=attention_reference)
    hidden = model(embeds, torch.arange(len(embeds)), attend)
    assert_close(hidden, reference.prefill(embeds)[0], atol=2e-5, rtol=0)


# -- plain text models, with transformers as the oracle -----------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES, rope_theta=5e5, tie_word_embeddings=True)),
        (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=24, rms_norm_eps=1e-6)),
        (Mistral, MistralConfig(**SIZES, sliding_window=32)),
    ],
    ids=["tied", "wide heads", "mistral"],
)
def test_text_models_match_transformers(tmp_path: Path, kind: Any, config: Any) -> None:
    torch.manual_seed(4)
    theirs = kind(config).eval()
    theirs.save_pretrained(tmp_path)
    model_config = read_model_config(tmp_path)
    ours = load_language_model(tmp_path, model_config, dtype="float32")
    ids = torch.randint(0, 120, (model_config.max_context if kind is Mistral else 50,))
    hidden = ours(ours.embed(ids), torch.arange(len(ids)), DenseAttend(3))
    assert_close(ours.logits(hidden), theirs(ids[None]).logits[0], atol=1e-5, rtol=1e-5)


def test_the_three_scales_match_granite() -> None:
    """Granite has the same three scales under other names; the rest of it is Llama."""
    torch.manual_seed(5)
    theirs = GraniteForCausalLM(
        GraniteConfig(
            **SIZES,
            embedding_multiplier=12.0,
            residual_multiplier=1.4 / 3**0.5,
            logits_scaling=64 / 16,
            attention_multiplier=16**-0.5,
            rms_norm_eps=1e-5,
        )
    ).eval()
    ours = LanguageModel(
        LanguageConfig(
            hidden=64,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mlp_width=96,
            vocab_size=120,
            max_context=256,
            norm_eps=1e-5,
            rope_theta=1e4,
            scale_emb=12.0,
            scale_depth=1.4,
            dim_model_base=16,
        )
    )
    state = theirs.state_dict()
    ours.embedding.weight.copy_(state["model.embed_tokens.weight"])
    ours.head.weight.copy_(state["lm_head.weight"])
    for index, layer in enumerate(ours.layers):
        stored = f"model.layers.{index}"
        layer.attention.qkv.weight.copy_(torch.cat([state[f"{stored}.self_attn.{x}_proj.weight"] for x in "qkv"]))
        layer.attention.out.weight.copy_(state[f"{stored}.self_attn.o_proj.weight"])
        layer.mlp.gate_up.weight.copy_(torch.cat([state[f"{stored}.mlp.{x}_proj.weight"] for x in ("gate", "up")]))
        layer.mlp.down.weight.copy_(state[f"{stored}.mlp.down_proj.weight"])
    ids = torch.randint(0, 120, (20,))
    hidden = ours(ours.embed(ids), torch.arange(20), DenseAttend(3))
    assert_close(ours.logits(hidden), theirs(ids[None]).logits[0], atol=1e-5, rtol=1e-5)
