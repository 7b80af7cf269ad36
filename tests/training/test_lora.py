"""Adapters in peft's format: what peft reads and writes means the same here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_cases import row_about, talk

from omnilmm.config import Family
from omnilmm.errors import CheckpointError
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.weights import load_language_model, to_checkpoint
from omnilmm.training.config import PROJECTIONS, LoraConfig
from omnilmm.training.learner import Learner
from omnilmm.training.lora import CONFIG_FILE, PEFT_PREFIX, WEIGHTS_FILE, Adapter, load_adapter
from omnilmm.training.rows import collate
from omnilmm.training.sequences import SequenceMaker

IDS = torch.tensor([1, 20, 300, 77, 5, 130])


@pytest.fixture
def config(folder: Path) -> ModelConfig:
    return read_model_config(folder)


@pytest.fixture
def model(folder: Path, config: ModelConfig) -> LanguageModel:
    return load_language_model(folder, config, dtype="float32")


@torch.no_grad()
def logits(model: LanguageModel) -> torch.Tensor:
    attend = DenseAttend(model.config.num_layers)
    return model.logits(model(model.embed(IDS), torch.arange(len(IDS)), attend))


def random_adapter(config: ModelConfig, lora: LoraConfig = LoraConfig(r=3, lora_alpha=7.0)) -> Adapter:  # noqa: B008
    torch.manual_seed(1)
    adapter = Adapter(config, lora)
    for up in adapter.up:
        torch.nn.init.normal_(up, std=0.2)
    return adapter


def test_a_new_adapter_changes_nothing(model: LanguageModel, config: ModelConfig) -> None:
    before = logits(model)
    adapter = Adapter(config, LoraConfig())
    adapter.attach(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("targets", [PROJECTIONS, ("k_proj", "down_proj"), ("q_proj", "v_proj")])
def test_attached_and_merged_give_the_same(targets: tuple[str, ...], model: LanguageModel, config: ModelConfig) -> None:
    before = logits(model)
    adapter = random_adapter(config, LoraConfig(r=2, target_modules=targets, use_rslora=True))
    adapter.attach(model)
    attached = logits(model)
    adapter.detach()
    assert torch.equal(logits(model), before)
    assert not torch.allclose(attached, before, atol=1e-2)
    adapter.merge_into(model)
    torch.testing.assert_close(logits(model), attached, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_it_is_the_same(config: ModelConfig, tmp_path: Path) -> None:
    adapter = random_adapter(config)
    adapter.save(tmp_path, base="somewhere")
    again = load_adapter(tmp_path, config)
    assert again.lora.scale == adapter.lora.scale
    assert all(map(torch.equal, again.parameters(), adapter.parameters()))
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["base_model_name_or_path"] == "somewhere"


# -- against peft and transformers ------------------------------------------------------------------------


class Outer(torch.nn.Module):
    """What the 3B family's adapters name: the language model is `llm` of something larger."""

    def __init__(self, llm: torch.nn.Module) -> None:
        super().__init__()
        self.llm = llm


def stock_model(family: Family, model: LanguageModel, config: ModelConfig) -> torch.nn.Module:
    """A transformers model with the same weights. MiniCPM's three scales are folded into the weights of a Llama."""
    transformers = pytest.importorskip("transformers")
    language = config.language
    settings = {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden,
        "intermediate_size": language.mlp_width,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "rms_norm_eps": language.norm_eps,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    kind = "Mistral" if family is Family.OMNILMM_12B else "Llama"
    stock = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    weights = {name.removeprefix("llm."): t.clone() for name, t in to_checkpoint(config, language_model=model)}
    weights["model.embed_tokens.weight"] *= language.scale_emb
    weights["lm_head.weight"] /= language.logit_divisor
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= language.residual_scale
    stock.load_state_dict(weights)
    return stock if family is Family.OMNILMM_12B else Outer(stock)


@torch.no_grad()
def stock_logits(stock: torch.nn.Module) -> torch.Tensor:
    model = getattr(stock, "llm", stock)
    return model(IDS[None]).logits[0]


def test_peft_reads_what_we_write(family: Family, model: LanguageModel, config: ModelConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    stock = stock_model(family, model, config)
    torch.testing.assert_close(stock_logits(stock), logits(model), rtol=1e-4, atol=1e-4)
    # the residual scale of MiniCPM is not part of an adapter: leave out the projections it was folded into
    targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") if family is Family.OMNILMM_3B else PROJECTIONS
    adapter = random_adapter(config, LoraConfig(r=3, lora_alpha=7.0, target_modules=targets))
    adapter.save(tmp_path, base="x")
    adapter.attach(model)
    settings = peft.LoraConfig.from_pretrained(str(tmp_path))
    wrapped = peft.tuners.lora.LoraModel(stock, settings, "default")
    loaded = peft.set_peft_model_state_dict(wrapped, _read(tmp_path, strip="base_model."), adapter_name="default")
    assert not loaded.unexpected_keys
    assert not any("lora_" in key for key in loaded.missing_keys)
    with torch.no_grad():
        theirs = stock_logits(stock)
    torch.testing.assert_close(theirs, logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers about something that has a new name
def test_we_read_what_peft_writes(pico_folders: dict[Family, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = pico_folders[Family.OMNILMM_12B]
    config = read_model_config(folder)
    model = load_language_model(folder, config, dtype="float32")
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(stock_model(Family.OMNILMM_12B, model, config), settings)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(str(tmp_path))
    load_adapter(tmp_path, config).attach(model)
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def _read(folder: Path, *, strip: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name.removeprefix(strip): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"peft_type": "LOHA"}, {"bias": "all"}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"r": "8"}],
)
def test_other_kinds_of_adapters_are_refused(change: dict[str, object], config: ModelConfig, tmp_path: Path) -> None:
    random_adapter(config).save(tmp_path, base="x")
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError):
        load_adapter(tmp_path, config)


def test_missing_and_misshapen_tensors_are_named(config: ModelConfig, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    random_adapter(config).save(tmp_path, base="x")
    stored = _read(tmp_path, strip="")
    name = next(iter(stored))
    save_file({key: tensor for key, tensor in stored.items() if key != name}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=name.removeprefix(PEFT_PREFIX)):
        load_adapter(tmp_path, config)
    save_file(stored | {name: torch.zeros(1, 1)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="shape"):
        load_adapter(tmp_path, config)


def test_a_missing_folder_is_an_error_of_ours(config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_adapter(tmp_path / "nowhere", config)


def test_dropout_acts_in_training_only(learner_of: Callable[..., Learner], maker: SequenceMaker) -> None:
    learner = learner_of(learn=(), lora=LoraConfig(r=2, lora_dropout=0.5))
    for up in learner.adapter.up:
        torch.nn.init.normal_(up, std=0.2)
    batch = collate([row_about(maker, 0, talk("What?", "That."))])
    assert learner(batch).answers != learner(batch).answers
    learner.eval()
    assert learner(batch).answers == learner(batch).answers
