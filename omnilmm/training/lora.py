"""Low-rank adapters (Hu et al. 2021) for the language model, in peft's file format.

Our projections are fused (q, k, v in one matrix), the official ones that an adapter names are not. So an adapter does
not replace layers: it owns one low-rank pair per official projection and adds each to its rows of what the fused
layer gives. The model under it stays as it is, and is exported under the same names with or without an adapter.

A saved adapter is `adapter_config.json` and `adapter_model.safetensors` with the names peft gives to the projections of
the official model (``base_model.model.`` in front, ``.lora_A.weight`` behind).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from omnilmm.errors import CheckpointError
from omnilmm.models.config import ModelConfig
from omnilmm.models.decoder import LanguageModel
from omnilmm.models.layout import Part, TensorSlot, checkpoint_layout
from omnilmm.training.config import LoraConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


class Adapter(nn.Module):
    """The pairs of one adapter: `down[i]` (r, in) and `up[i]` (out, r) belong to `slots[i]`. At first it changes
    nothing."""

    def __init__(self, config: ModelConfig, lora: LoraConfig) -> None:
        super().__init__()
        self.lora = lora
        self.slots = tuple(projection_slots(config, lora.target_modules).values())
        self.down = nn.ParameterList(torch.empty(lora.r, slot.shape[1]) for slot in self.slots)
        self.up = nn.ParameterList(torch.zeros(slot.shape[0], lora.r) for slot in self.slots)
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=5**0.5)
        self._hooks: list[RemovableHandle] = []

    def attach(self, model: LanguageModel) -> None:
        """Let the adapter act on `model` until `detach`."""
        assert not self._hooks
        by_layer: dict[str, list[int]] = defaultdict(list)
        for index, slot in enumerate(self.slots):
            by_layer[slot.parameter.removesuffix(".weight")].append(index)
        for name, indices in by_layer.items():
            layer = model.get_submodule(name)
            self._hooks.append(layer.register_forward_hook(partial(self._add, indices)))

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _add(self, indices: list[int], layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = functional.dropout(inputs[0], self.lora.lora_dropout, self.training)
        pieces, done = [], 0
        for index in indices:  # in the order of their rows, as the layout lists them
            rows = self.slots[index].rows
            low = functional.linear(x, self.down[index].to(x.dtype))
            delta = functional.linear(low, self.up[index].to(low.dtype)) * self.lora.scale
            pieces += [out[..., done : rows.start], out[..., rows] + delta.to(out.dtype)]
            done = rows.stop
        return torch.cat((*pieces, out[..., done:]), dim=-1)

    @torch.no_grad()
    def merge_into(self, model: LanguageModel) -> None:
        """Add the adapter to the weights for good. It must not be attached, or it would act twice."""
        assert not self._hooks
        parameters = dict(model.named_parameters())
        for slot, down, up in zip(self.slots, self.down, self.up, strict=True):
            rows = parameters[slot.parameter][slot.rows]
            rows.copy_(rows.float() + self.lora.scale * (up.float() @ down.float()).to(rows.device))

    def save(self, folder: Path, *, base: str) -> None:
        """Write both files into `folder`, which exists. `base` names the checkpoint the adapter belongs to."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for slot, down, up in zip(self.slots, self.down, self.up, strict=True):
            module = PEFT_PREFIX + slot.name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = down.detach().to("cpu", torch.float32).contiguous()
            tensors[f"{module}.lora_B.weight"] = up.detach().to("cpu", torch.float32).contiguous()
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(_peft_config(self.lora, base), indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def projection_slots(config: ModelConfig, targets: tuple[str, ...]) -> Mapping[str, TensorSlot]:
    """The language model's projections of these official kinds, by official module name, in the layout's order."""
    return {
        name.removesuffix(".weight"): slot
        for name, slot in checkpoint_layout(config).items()
        if slot.part is Part.LANGUAGE and name.removesuffix(".weight").rpartition(".")[2] in targets
    }


def load_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """An adapter that `Adapter.save` or peft wrote for the language model of `config`.

    Names may begin at the language model or, in the 3B family, at the whole model (``llm.``).

    Raises:
        CheckpointError: a file is missing or cannot be read, it is another kind of adapter, or a tensor does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        stored = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError("The adapter's two files cannot be read.") from error
    adapter = Adapter(config, _lora_config(values))
    expected: dict[str, Tensor] = {}
    for slot, down, up in zip(adapter.slots, adapter.down, adapter.up, strict=True):
        module = slot.name.removesuffix(".weight")
        expected |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    prefix = "llm." if any(name.startswith("llm.") for name in expected) else ""
    named = {_official_name(name, prefix): tensor for name, tensor in stored.items()}
    for name in sorted(named.keys() ^ expected.keys()):
        raise CheckpointError(f"The adapter {'lacks' if name in expected else 'has the unknown tensor'} {name}.")
    with torch.no_grad():
        for name, tensor in named.items():
            if tensor.shape != expected[name].shape:
                raise CheckpointError(f"The adapter's tensor {name} has another shape than the model asks for.")
            expected[name].copy_(tensor)
    return adapter


def _official_name(name: str, prefix: str) -> str:
    name = name.removeprefix(PEFT_PREFIX)
    return name if name.startswith(prefix) else prefix + name


def _peft_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "target_modules": sorted(lora.target_modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": lora.use_rslora,
    }


# What peft can do besides, with the value that means "not used". Anything else would change the maths.
_UNUSED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


def _lora_config(values: Any) -> LoraConfig:
    if not isinstance(values, dict):
        raise CheckpointError(f"{CONFIG_FILE} does not hold a JSON object.")
    for key, allowed in _UNUSED.items():
        if key in values and values[key] not in allowed:
            raise CheckpointError(f"{CONFIG_FILE}: {key} has a value that is not supported.")
    targets = values.get("target_modules")
    if not isinstance(targets, list) or type(values.get("r")) is not int:
        raise CheckpointError(f"{CONFIG_FILE}: r or target_modules is missing or not of the usual kind.")
    return LoraConfig(
        r=values["r"],
        lora_alpha=float(values.get("lora_alpha", 8)),
        lora_dropout=float(values.get("lora_dropout", 0.0)),
        target_modules=tuple(sorted(target.rpartition(".")[2] for target in targets)),
        use_rslora=bool(values.get("use_rslora", False)),
    )
