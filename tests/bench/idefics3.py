"""How like the bench's own checkpoint its Idefics3 form is, and what a picture costs each encoder alone.

    python tests/bench/idefics3.py

Writes both (bench_vision_model.py, bench_idefics3.py) and runs them in this process, ours and transformers': what the
towers give for the same pixels and the decoders for the same ids (float32), the prepared pixels of one picture, and
the milliseconds that one and two pictures take (bfloat16, two threads, medians of five).
"""

from __future__ import annotations

import base64
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_idefics3 import write_idefics3
from bench_vision_model import write_checkpoint
from multiturn import picture
from PIL import Image
from transformers import AutoProcessor, Idefics3ForConditionalGeneration

from omnilmm.config import ImageLimits, InputHandling
from omnilmm.encoder.encode import VisionEncoder
from omnilmm.image.transform import prepare
from omnilmm.messages import PreparedImage
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import ModelConfig, read_model_config
from omnilmm.models.weights import load_encoder, load_language_model

IDS = (1, 378, 392, 654, 5, 682, 424, 394, 493, 671, 653, 396, 654)  # a short question


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "idefics3"
        print(write_checkpoint(ours))
        write_idefics3(ours, theirs)
        compare(ours, theirs, read_model_config(ours))
        time_encoders(ours, theirs, read_model_config(ours))


def compare(ours: Path, theirs: Path, config: ModelConfig) -> None:
    idefics3 = Idefics3ForConditionalGeneration.from_pretrained(theirs, dtype=torch.float32).eval()
    encoder = load_encoder(ours, config, dtype="float32")
    language = load_language_model(ours, config, dtype="float32")
    pixels = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    vectors = encoder.vision(pixels), idefics3.model.vision_model(pixel_values=pixels).last_hidden_state
    tell("the towers' vectors", *vectors)
    ids = torch.tensor(IDS)
    hidden = language(language.embed(ids), torch.arange(len(ids)), DenseAttend(config.language.num_layers))
    num_ids = config.language.vocab_size
    tell("the decoders' logits", language.logits(hidden), idefics3(input_ids=ids[None]).logits[0, :, :num_ids])
    data = base64.b64decode(picture(1).partition(",")[2])
    processed = AutoProcessor.from_pretrained(theirs)(text="<image>", images=[Image.open(io.BytesIO(data))])
    square = torch.frombuffer(bytearray(prepared(1, config).square), dtype=torch.uint8).view(448, 448, 3)
    tell(
        "a picture's pixels",
        (square / 255 - 0.5).permute(2, 0, 1) / 0.5,
        torch.from_numpy(np.asarray(processed["pixel_values"])).view(3, 448, 448),
    )


def tell(name: str, one: torch.Tensor, other: torch.Tensor) -> None:
    difference = (one - other).abs()
    print(
        f"{name:22} differ by {difference.mean():.5f} at the mean, {difference.max():.5f} at most; std {one.std():.3f}"
    )


def time_encoders(ours: Path, theirs: Path, config: ModelConfig) -> None:
    encoder = VisionEncoder(load_encoder(ours, config, dtype="bfloat16"), config.image_policy(InputHandling.SAFE))
    idefics3 = Idefics3ForConditionalGeneration.from_pretrained(theirs, dtype=torch.bfloat16).eval().model
    images = [prepared(number, config) for number in range(2)]

    def see(images: list[PreparedImage]) -> None:
        pixels = torch.randn(len(images), 3, 448, 448, dtype=torch.bfloat16)
        idefics3.connector(idefics3.vision_model(pixel_values=pixels).last_hidden_state)

    for several in (images[:1], images):
        mine, other = median_ms(partial(encoder.encode, several)), median_ms(partial(see, several))
        print(f"pictures at once: {len(several)}; ours {mine:.0f} ms, transformers' Idefics3 {other:.0f} ms")


def median_ms(work: Callable[[], object]) -> float:
    work()
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - begun))
    return statistics.median(taken)


def prepared(number: int, config: ModelConfig) -> PreparedImage:
    data = base64.b64decode(picture(number).partition(",")[2])
    return prepare(data, policy=config.image_policy(InputHandling.SAFE), limits=ImageLimits(), param="")


if __name__ == "__main__":
    main()
