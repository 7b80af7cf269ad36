"""How far this implementation is from the original, stage by stage: the largest absolute error over all goldens.

    python tests/bench/parity.py [--images FOLDER]

Everything is computed with the product's own rooms (image, prompt, models, engine) from the picture files and the
conversations of the reference checkpoints in tests/data. FOLDER may hold the one picture that is not shipped.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from omnilmm.config import ImageLimits, InputHandling
from omnilmm.engine.plan import Draw
from omnilmm.engine.sampling import distribution
from omnilmm.image.transform import decode, normalise, squash
from omnilmm.messages import Conversation, ImagePart, Prompt, Sampling, TextPart, Turn
from omnilmm.models.attention import DenseAttend
from omnilmm.models.beam import beam_search
from omnilmm.models.config import read_model_config
from omnilmm.models.weights import load_encoder, load_language_model, torch_dtype
from omnilmm.prompt.detokenize import answer_text
from omnilmm.prompt.template import load_template

DATA = Path(__file__).parents[1] / "data"
FAMILIES = ("omnilmm-12b-tiny", "minicpm-v-tiny")
MAX_TOKENS = 24


class Errors(dict[str, list[str]]):
    """Largest error by kind, or how many of how many are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, float] = {}
        self.counts: dict[str, list[bool]] = {}

    def far(self, kind: str, ours: torch.Tensor, golden: torch.Tensor) -> None:
        error = float((ours.float() - golden.float()).abs().max())
        self.numbers[kind] = max(self.numbers.get(kind, 0.0), error)

    def equal(self, kind: str, is_equal: bool) -> None:
        self.counts.setdefault(kind, []).append(is_equal)

    def told(self) -> dict[str, str]:
        numbers = {kind: f"{error:.1e}" for kind, error in self.numbers.items()}
        return numbers | {kind: f"{sum(all_)} of {len(all_)} equal" for kind, all_ in self.counts.items()}


class Family:
    """One reference checkpoint and our models of it."""

    def __init__(self, name: str, images: list[Path]) -> None:
        self.folder, self.images, self.errors = DATA / name, images, Errors()
        self.goldens = json.loads((self.folder / "goldens.json").read_text(encoding="utf-8"))
        self.tensors = load_file(self.folder / "goldens.safetensors")
        self.config = read_model_config(self.folder)
        self.policy = self.config.image_policy(InputHandling.ORIGINAL)
        self.template = load_template(self.config.family, self.folder)
        self.encoder = load_encoder(self.folder, self.config, dtype="float32")
        self.model = load_language_model(self.folder, self.config, dtype="float32")
        self.vectors: dict[str, torch.Tensor] = {}
        self.pixels: dict[str, torch.Tensor] = {}

    def find(self, name: str) -> Path | None:
        return next((folder / name for folder in self.images if (folder / name).exists()), None)

    def pictures(self) -> None:
        for name, golden in self.goldens["images"].items():
            path = self.find(name)
            if path is None:
                continue
            image = decode(path.read_bytes(), InputHandling.ORIGINAL, ImageLimits())
            square = squash(image, self.policy.side)
            self.errors.equal("decoded bytes", sha(np.asarray(image).tobytes()) == golden["rgb_uint8_sha256"])
            if golden[
                "pillow13_max_level_difference"
            ]:  # this Pillow resizes it a little differently: take the stored one
                stored = np.asarray(Image.open(io.BytesIO((self.folder / golden["resized_png"]).read_bytes())))
                far = np.abs(stored.astype(int) - np.frombuffer(square, np.uint8).reshape(stored.shape)).max()
                self.errors.equal(
                    "resized within Pillow 13's difference", far <= golden["pillow13_max_level_difference"]
                )
                square = stored.tobytes()
            self.errors.equal("resized bytes", sha(square) == golden["resized_uint8_sha256"])
            pixels = normalise(square, self.policy)
            self.errors.equal("pixel tensor, bit for bit", sha(pixels.tobytes()) == golden["pixel_values_sha256"])
            self.pixels[name] = torch.from_numpy(pixels)[None]
            features = self.encoder.vision_features(self.pixels[name])
            if f"image.{name}.vision_features" in self.tensors:
                whole = self.tensors[f"image.{name}.vision_features"]
                self.errors.far("vision features", features[0], whole[-features.shape[1] :])  # no class token here
            self.vectors[name] = self.encoder(self.pixels[name])[0]
            self.errors.far("resampler", self.vectors[name], self.tensors[f"image.{name}.resampler"])

    def cases(self) -> None:
        for case in self.goldens["cases"]:
            if case["image"] in self.vectors:
                self.case(case, f"{case['image']}|{case['conversation']}")

    def case(self, case: dict[str, Any], name: str) -> None:
        conversation = self.conversation(self.goldens["conversations"][case["conversation"]])
        prompt = self.template.render(conversation, InputHandling.ORIGINAL)
        text = self.template.text(conversation, InputHandling.ORIGINAL)
        self.errors.equal("prompt", text == case["prompt"])
        self.errors.equal("input ids", list(prompt.ids) == case["input_ids"])
        embeds = self.merge(prompt, self.vectors[case["image"]])
        hidden, layers = self.forward(embeds)
        if f"{name}.inputs_embeds" in self.tensors:
            self.errors.far("merged embeddings", embeds, self.tensors[f"{name}.inputs_embeds"])
            golden = self.tensors[f"{name}.hidden_states_last_position"]
            self.errors.far("hidden states", torch.stack([embeds[-1], *layers[:-1], hidden[-1]]), golden)
        self.errors.far("last logits", self.model.logits(hidden[-1:])[0], self.tensors[f"{name}.logits_last"])
        self.runs(case, embeds)
        self.probabilities(case, name, embeds)

    def runs(self, case: dict[str, Any], embeds: torch.Tensor) -> None:
        for run in ("greedy", "greedy_reppen", "greedy_eos", "beam3", "beam3_eos"):
            golden = case[run]
            eos = (golden["eos_token_id"],) if "eos_token_id" in golden else ()
            penalty = golden.get("repetition_penalty", 1.0)
            if run.startswith("beam"):
                eos = eos or self.template.eos_ids
                ids, score = beam_search(
                    self.model,
                    embeds,
                    num_beams=golden["num_beams"],
                    max_tokens=MAX_TOKENS,
                    eos_ids=eos,
                    repetition_penalty=penalty,
                    bos_id=self.config.bos_id,
                )
                self.errors.far("beam scores", torch.tensor(score), torch.tensor(golden["sequences_score"]))
            else:
                ids = self.greedy(embeds, penalty, eos)
            self.errors.equal(f"{run} ids", [self.config.bos_id, *ids] == golden["sequence_ids"])
            answer = answer_text(self.template.tokenizer, golden["sequence_ids"], self.config.family)
            self.errors.equal("answer text", answer == golden["text"])

    def greedy(self, embeds: torch.Tensor, penalty: float, eos: tuple[int, ...]) -> tuple[int, ...]:
        attend = DenseAttend(self.config.language.num_layers)
        ids: list[int] = []
        position = 0
        sampling = Sampling(max_tokens=MAX_TOKENS, repetition_penalty=penalty)
        while len(ids) < MAX_TOKENS and (not ids or ids[-1] not in eos):
            hidden = self.model(embeds, torch.arange(position, position + len(embeds)), attend)
            position += len(embeds)
            draw = Draw(sampling, len(ids), seen=(self.config.bos_id, *ids))
            ids.append(int(distribution(self.model.logits(hidden[-1:]), [draw]).argmax()))
            embeds = self.model.embed(torch.tensor(ids[-1:]))
        return tuple(ids)

    def probabilities(self, case: dict[str, Any], name: str, embeds: torch.Tensor) -> None:
        golden, expected = case["sample"], self.tensors[f"{name}.sample_probs"]
        drawn = golden["sequence_ids"][1 : len(expected)]
        hidden, _ = self.forward(torch.cat([embeds, self.model.embed(torch.tensor(drawn))]))
        sampling = Sampling(
            max_tokens=MAX_TOKENS,
            temperature=golden["temperature"],
            top_k=golden["top_k"],
            top_p=golden["top_p"],
            repetition_penalty=golden.get("repetition_penalty", 1.0),
        )
        draws = [Draw(sampling, step, seen=(self.config.bos_id, *drawn[:step])) for step in range(len(expected))]
        ours = distribution(self.model.logits(hidden[-len(expected) :]), draws)
        self.errors.far("sampling probabilities", ours, expected)

    def precision(self) -> None:
        """bfloat16 and float16 against our own float32, on the case the reference measured too."""
        name = self.goldens["full_case"]
        case = next(c for c in self.goldens["cases"] if f"{c['image']}|{c['conversation']}" == name)
        prompt = Prompt(tuple(case["input_ids"]), (), ())
        patch = self.tensors[f"{name}.inputs_embeds"]
        exact = self.model.logits(self.forward(patch)[0][-1:])
        for dtype in ("bfloat16", "float16"):
            encoder = load_encoder(self.folder, self.config, dtype=dtype)
            model = load_language_model(self.folder, self.config, dtype=dtype)
            vectors = encoder(self.pixels[case["image"]].to(torch_dtype(dtype)))[0]
            self.errors.far(f"{dtype}: resampler against float32", vectors, self.vectors[case["image"]])
            embeds = model.embed(torch.tensor(prompt.ids))
            is_picture = (self.model.embed(torch.tensor(prompt.ids)) - patch).abs().amax(dim=1) > 1e-3
            embeds[is_picture] = vectors
            hidden = model(embeds, torch.arange(len(embeds)), DenseAttend(self.config.language.num_layers))
            logits = model.logits(hidden[-1:])
            self.errors.far(f"{dtype}: last logits against float32", logits, exact)
            self.errors.equal(f"{dtype}: same likeliest token", int(logits.argmax()) == int(exact.argmax()))

    def conversation(self, messages: list[dict[str, str]]) -> Conversation:
        turns = [Turn(m["role"], (TextPart(m["content"]),)) for m in messages]  # type: ignore[arg-type]
        first = Turn("user", (ImagePart(b"", ""), *turns[0].parts))
        return Conversation((first, *turns[1:]))

    def merge(self, prompt: Prompt, vectors: torch.Tensor) -> torch.Tensor:
        embeds = self.model.embed(torch.tensor(prompt.ids)).clone()
        for span in prompt.spans:
            embeds[span.start : span.start + span.length] = vectors
        return embeds

    def forward(self, embeds: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states after the final norm, and the last position after each layer."""
        layers: list[torch.Tensor] = []
        hooks = [layer.register_forward_hook(lambda _m, _i, out: layers.append(out[-1])) for layer in self.model.layers]
        hidden = self.model(embeds, torch.arange(len(embeds)), DenseAttend(self.config.language.num_layers))
        for hook in hooks:
            hook.remove()
        return hidden, layers


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with the reference picture that is not shipped")
    options = parser.parse_args()
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    folders = [DATA / "images", *([options.images] if options.images else [])]
    told = []
    for name in FAMILIES:
        family = Family(name, folders)
        family.pictures()
        family.cases()
        family.precision()
        told.append(family.errors.told())
    print(f"| golden | {' | '.join(FAMILIES)} |\n|---|---|---|")
    for kind in dict.fromkeys(kind for errors in told for kind in errors):
        print(f"| {kind} | {' | '.join(errors.get(kind, '-') for errors in told)} |")


if __name__ == "__main__":
    main()
