"""What int8 and fp8 do to the answers: vectors, first-token probabilities and greedy answers, against exact ones.

    python tests/bench/encoding_loss.py [--model NAME=FOLDER ...] [--pictures FOLDER ...] [--write docs/cache.md]
    python tests/bench/encoding_loss.py --model NAME=FOLDER --pictures FOLDER --question TEXT ...

Every picture is asked every question of the reference, or those given (then answers end where the model ends them), in
float32, with the vectors as they are and as they come out of each encoding. Rounding the vectors to bfloat16 is the
yardstick: it is what every bfloat16 model does to them anyway.

    refused          pictures whose vectors the gate of cache/encoding did not let through (they are kept exact)
    cosine           between a token's vector before and after: the least of all, and the mean
    KL               between the distributions of the first token, in nats: the mean and the most of all cases
    same next token  over the exact greedy answers: how often the likeliest next token is the same
    same answer      greedy answers of 24 tokens that are the same to the end

--write puts the table into a file, between the two lines that hold its marks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from omnilmm.cache.encoding import Encoding, try_pack, unpack
from omnilmm.config import ImageLimits, InputHandling
from omnilmm.image.transform import decode, normalise, squash
from omnilmm.messages import Conversation, Embedding, ImagePart, Prompt, TextPart, Turn
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import read_model_config
from omnilmm.models.weights import load_encoder, load_language_model
from omnilmm.prompt.template import load_template

DATA = Path(__file__).parents[1] / "data"
FAMILIES = ("omnilmm-12b-tiny", "minicpm-v-tiny")
PICTURE_FILES = {".jpg", ".jpeg", ".png", ".webp"}
MAX_TOKENS = 24
MARKS = ("<!-- quality table: begin -->", "<!-- quality table: end -->")
YARDSTICK = "bfloat16 rounding"
HEAD = "| model | vectors | refused | cosine least, mean | KL mean, most | same next token | same answer |"


@dataclass
class Tally:
    """What one way of keeping vectors did to one model, over all cases."""

    num_pictures: int = 0
    num_refused: int = 0
    cosines: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    same_tokens: list[bool] = field(default_factory=list)
    same_answers: list[bool] = field(default_factory=list)

    def row(self, model: str, name: str) -> str:
        cells = [
            model,
            name,
            f"{self.num_refused} of {self.num_pictures}",
            f"{min(self.cosines):.5f}, {np.mean(self.cosines):.5f}",
            f"{np.mean(self.divergences):.1e}, {max(self.divergences):.1e}",
            f"{100 * np.mean(self.same_tokens):.1f} %",
            f"{sum(self.same_answers)} of {len(self.same_answers)}",
        ]
        return f"| {' | '.join(cells)} |"


class Subject:
    """A checkpoint, its pictures as vectors, and the questions."""

    def __init__(self, folder: Path, conversations: Sequence[list[dict[str, str]]], *, may_end: bool) -> None:
        self.config = read_model_config(folder)
        self.policy = self.config.image_policy(InputHandling.SAFE)
        self.encoder = load_encoder(folder, self.config, dtype="float32")
        self.model = load_language_model(folder, self.config, dtype="float32")
        template = load_template(self.config.family, folder, num_image_tokens=self.config.num_image_tokens)
        self.ends = template.eos_ids if may_end else frozenset()
        self.prompts = [template.render(_conversation(messages), InputHandling.SAFE) for messages in conversations]

    def vectors(self, picture: Path) -> torch.Tensor:
        """(num_query, hidden) float32."""
        assert self.policy is not None
        image = decode(picture.read_bytes(), self.policy.handling, ImageLimits())
        pixels = normalise(squash(image, self.policy.side), self.policy)  # (3, side, side)
        return self.encoder(torch.from_numpy(pixels)[None])[0]

    def embeds(self, prompt: Prompt, vectors: torch.Tensor) -> torch.Tensor:
        """(T, hidden) with the picture in its place."""
        merged = self.model.embed(torch.tensor(prompt.ids)).clone()
        for span in prompt.spans:
            merged[span.start : span.start + span.length] = vectors
        return merged

    def logits(self, embeds: torch.Tensor) -> torch.Tensor:
        """(T, vocabulary)."""
        hidden = self.model(embeds, torch.arange(len(embeds)), DenseAttend(self.config.language.num_layers))
        return self.model.logits(hidden)

    def answer(self, embeds: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Logits of the first token, and the greedy answer."""
        attend, position = DenseAttend(self.config.language.num_layers), 0
        ids: list[int] = []
        first = torch.empty(0)
        while len(ids) < MAX_TOKENS:
            hidden = self.model(embeds, torch.arange(position, position + len(embeds)), attend)
            position += len(embeds)
            logits = self.model.logits(hidden[-1:])[0]
            first = first if ids else logits
            ids.append(int(logits.argmax()))
            if ids[-1] in self.ends:
                break
            embeds = self.model.embed(torch.tensor(ids[-1:]))
        return first, ids


def compare(subject: Subject, pictures: list[Path]) -> dict[str, Tally]:
    ways = [YARDSTICK, *(encoding.value for encoding in Encoding if encoding is not Encoding.EXACT)]
    tallies = {way: Tally() for way in ways}
    for picture in pictures:
        exact = subject.vectors(picture)
        kept = {way: there_and_back(exact, way) for way in ways}
        for way, vectors in kept.items():
            tally = tallies[way]
            tally.num_pictures += 1
            tally.num_refused += vectors is None
            tally.cosines += torch.cosine_similarity(exact, exact if vectors is None else vectors, dim=1).tolist()
        for prompt in subject.prompts:
            reference = subject.answer(subject.embeds(prompt, exact))
            for way, vectors in kept.items():
                ask(subject, prompt, exact if vectors is None else vectors, reference, tallies[way])
    return tallies


def ask(
    subject: Subject, prompt: Prompt, vectors: torch.Tensor, reference: tuple[torch.Tensor, list[int]], tally: Tally
) -> None:
    first, answer = reference
    embeds = subject.embeds(prompt, vectors)
    ours, our_answer = subject.answer(embeds)
    exact, lossy = first.double().log_softmax(0), ours.double().log_softmax(0)
    tally.divergences.append(max(0.0, float((exact.exp() * (exact - lossy)).sum())))
    led = torch.cat([embeds, subject.model.embed(torch.tensor(answer[:-1]))])  # along the exact answer
    tally.same_tokens += (subject.logits(led)[-len(answer) :].argmax(dim=1) == torch.tensor(answer)).tolist()
    tally.same_answers.append(answer == our_answer)


def there_and_back(vectors: torch.Tensor, way: str) -> torch.Tensor | None:
    """None where the gate refuses."""
    if way == YARDSTICK:
        return vectors.bfloat16().float()
    rows, columns = vectors.shape
    embedding = Embedding("float32", (rows, columns), vectors.contiguous().numpy().tobytes())
    packed = try_pack(embedding, Encoding(way))
    if packed is None:
        return None
    numbers = unpack(packed, Encoding(way), "float32", (rows, columns))
    return torch.frombuffer(bytearray(numbers), dtype=torch.float32).view(rows, columns)


def _conversation(messages: list[dict[str, str]]) -> Conversation:
    turns = [Turn(m["role"], (TextPart(m["content"]),)) for m in messages]  # type: ignore[arg-type]
    return Conversation((Turn("user", (ImagePart(b"", ""), *turns[0].parts)), *turns[1:]))


def write(path: Path, table: str) -> None:
    """Put the table between the marks.

    Raises:
        SystemExit: the file lacks them.
    """
    begin, end = MARKS
    head, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{path} has no lines {begin} and {end}")
    path.write_text(f"{head}{begin}\n\n{table}\n\n{end}{tail}", encoding="utf-8")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="NAME=FOLDER", help="instead of the two tiny ones")
    parser.add_argument("--pictures", action="append", type=Path, help="folders, instead of the reference pictures")
    parser.add_argument("--question", action="append", help="instead of those of the reference")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    models = [name.partition("=") for name in options.model or [f"{name}={DATA / name}" for name in FAMILIES]]
    folders = options.pictures or [DATA / "images"]
    pictures = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in PICTURE_FILES)
    reference = json.loads((DATA / FAMILIES[0] / "goldens.json").read_text(encoding="utf-8"))["conversations"]
    own = [[{"role": "user", "content": text}] for text in options.question or ()]
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for name, _, folder in models:
        subject = Subject(Path(folder), own or [*reference.values()], may_end=bool(own))
        tallies = compare(subject, pictures)
        lines += [tally.row(name, way) for way, tally in tallies.items()]
    table = "\n".join(lines)
    print(table)
    if options.write:
        write(options.write, table)


if __name__ == "__main__":
    main()
