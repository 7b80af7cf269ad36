"""The demonstration checkpoints: official in form, whole or absent, the same for the same seed, and alive."""

from __future__ import annotations

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cluster import demo
from cluster.demo import MARKER, demo_checkpoint, demo_picture, is_demo_checkpoint, write_demo_checkpoint
from omnilmm.config import Family, InputHandling
from omnilmm.errors import ConfigError
from omnilmm.messages import Conversation, ImagePart, TextPart, Turn
from omnilmm.models.attention import DenseAttend
from omnilmm.models.config import read_model_config
from omnilmm.models.layout import checkpoint_layout
from omnilmm.models.weights import load_encoder, load_language_model
from omnilmm.prompt.template import load_template

DATA = Path(__file__).resolve().parents[1] / "data"
REFERENCE = {Family.OMNILMM_12B: DATA / "omnilmm-12b-tiny", Family.OMNILMM_3B: DATA / "minicpm-v-tiny"}
MAX_BYTES = 3 * 2**20


@pytest.fixture(scope="module", params=list(REFERENCE), ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("demo") / "checkpoint", family)


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, read by the index as any loader would."""
    (index,) = folder.glob("*.index.json")
    weight_map = read(folder, index.name)["weight_map"]
    shards = {
        name: load_file(folder / name)
        if name.endswith(".safetensors")
        else torch.load(folder / name, weights_only=True, map_location="cpu")
        for name in set(weight_map.values())
    }
    assert set(weight_map) == {name for shard in shards.values() for name in shard}
    return {name: shards[file][name] for name, file in weight_map.items()}


def of_first_layer(names: set[str]) -> set[str]:
    """Names with every layer's number made 0."""
    return {re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.0.", name) for name in names}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- the official form ------------------------------------------------------------------------------------


def test_it_has_the_files_of_the_reference(family: Family, folder: Path) -> None:
    made, reference = ({path.name for path in place.iterdir()} for place in (folder, REFERENCE[family]))
    shards = {name for name in made | reference if re.search(r"-\d+-of-\d+\.", name)}
    assert reference - shards - made == {"README.md", "goldens.json", "goldens.safetensors"} | (
        {"tokenizer.json"} if family is Family.OMNILMM_12B else set()  # the same tokenizer in another format
    )
    assert made - shards - reference == {MARKER}
    assert {name.rpartition(".")[2] for name in shards & made} == {
        name.rpartition(".")[2] for name in shards & reference
    }
    assert len(shards & made) > 1


def test_it_is_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) < MAX_BYTES


def test_settings_have_the_official_fields(family: Family, folder: Path) -> None:
    made, reference = read(folder, "config.json"), read(REFERENCE[family], "config.json")
    assert reference.keys() - made.keys() <= {"auto_map", "_name_or_path"}  # they lead to code we never run
    assert made.keys() <= reference.keys()
    assert made["vision_config_override"].keys() == reference["vision_config_override"].keys() - {"note"}
    for name in ("model_type", "architectures", "image_size"):
        assert made[name] == reference[name]


def test_tokenizer_settings_are_the_reference_with_other_ids(family: Family, folder: Path) -> None:
    made, reference = (read(place, "tokenizer_config.json") for place in (folder, REFERENCE[family]))
    made_tokens = [entry["content"] for entry in made.pop("added_tokens_decoder").values()]
    assert made_tokens == [entry["content"] for entry in reference.pop("added_tokens_decoder").values()]
    reference.pop("auto_map", None)
    assert made == reference
    assert read(folder, "special_tokens_map.json") == read(REFERENCE[family], "special_tokens_map.json")


def test_tensors_are_named_and_shaped_like_the_official_ones(family: Family, folder: Path) -> None:
    made, reference = tensors(folder), tensors(REFERENCE[family])
    assert of_first_layer(set(made)) == of_first_layer(set(reference))
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        name: tuple(slot.shape) for name, slot in checkpoint_layout(read_model_config(folder)).items()
    }
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}


def test_the_position_table_of_the_resampler_is_the_official_one(family: Family, folder: Path) -> None:
    name = "model.resampler.pos_embed" if family is Family.OMNILMM_12B else "resampler.pos_embed"
    assert torch.equal(tensors(folder)[name], tensors(REFERENCE[family])[name])


def test_the_index_counts_the_bytes(folder: Path) -> None:
    (index,) = folder.glob("*.index.json")
    assert read(folder, index.name)["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())


# -- the tokenizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["What is in this picture?", "图片里有什么？红色的圆在左边。", "café, 日本語 😀\n two  spaces", "<用户>"]
)
def test_both_languages_and_everything_else_survive_the_tokenizer(family: Family, folder: Path, text: str) -> None:
    tokenizer = load_template(family, folder).tokenizer
    spelled = b"".join(tokenizer.token_bytes(token_id) for token_id in tokenizer.encode_parsed(text))
    assert spelled.decode("utf-8") == f" {text}"  # with SentencePiece's dummy space


def test_common_words_are_one_token(family: Family, folder: Path) -> None:
    tokenizer = load_template(family, folder).tokenizer
    for words in ("circle", "什么"):
        assert len(tokenizer.encode_parsed(words)) <= 2  # the leading space may stand alone


# -- whole or absent --------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_bytes(family: Family, folder: Path, tmp_path: Path) -> None:
    again = write_demo_checkpoint(tmp_path / "again", family)
    other = write_demo_checkpoint(tmp_path / "other", family, seed=1)
    assert content(again) == content(folder)
    assert content(other).keys() == content(folder).keys()
    assert not torch.equal(*(next(iter(tensors(place).values())) for place in (again, other)))


def test_a_finished_checkpoint_is_left_alone(family: Family, tmp_path: Path) -> None:
    folder = write_demo_checkpoint(tmp_path / "demo", family)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert is_demo_checkpoint(folder, family)
    write_demo_checkpoint(folder, family)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["a shard cut short", "a file lost", "an older recipe", "another seed"])
def test_a_damaged_or_different_checkpoint_is_made_anew(damage: str, tmp_path: Path) -> None:
    family = Family.OMNILMM_3B
    folder = write_demo_checkpoint(tmp_path / "demo", family, seed=1 if damage == "another seed" else 0)
    if damage == "a shard cut short":
        shard = next(folder.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "a file lost":
        (folder / "config.json").unlink()
    elif damage == "an older recipe":
        (folder / MARKER).write_text(json.dumps(read(folder, MARKER) | {"recipe": 0}))
    assert not is_demo_checkpoint(folder, family)
    assert content(write_demo_checkpoint(folder, family)) == content(write_demo_checkpoint(tmp_path / "whole", family))


def test_without_its_marker_a_folder_is_not_ours_to_replace(tmp_path: Path) -> None:
    folder = write_demo_checkpoint(tmp_path / "demo", Family.OMNILMM_3B)
    (folder / MARKER).write_bytes((folder / MARKER).read_bytes()[:-10])
    left = content(folder)
    with pytest.raises(ConfigError):
        write_demo_checkpoint(folder, Family.OMNILMM_3B)
    assert content(folder) == left


def test_of_several_who_ask_at_once_one_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    makers: list[Path] = []
    write_files = demo._write_files

    def counted(folder: Path, family: Family, seed: int) -> None:
        makers.append(folder)
        write_files(folder, family, seed)

    monkeypatch.setattr(demo, "_write_files", counted)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(write_demo_checkpoint, tmp_path / "demo", Family.OMNILMM_12B) for _ in range(4)]
    assert {future.result() for future in asked} == {tmp_path / "demo"}
    assert len(makers) == 1


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError):
        write_demo_checkpoint(tmp_path, Family.OMNILMM_12B)
    assert content(tmp_path) == {"thesis.txt": b"years of work"}


def test_what_a_dead_process_left_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".demo.partial").mkdir()
    (tmp_path / ".demo.partial" / "config.json").write_text("{")
    folder = write_demo_checkpoint(tmp_path / "demo", Family.OMNILMM_12B)
    assert is_demo_checkpoint(folder, Family.OMNILMM_12B)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(demo.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_demo_checkpoint(tmp_path / "demo", Family.OMNILMM_12B)
    assert not (tmp_path / "demo").exists()


def test_there_is_no_demonstration_of_a_text_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_demo_checkpoint(tmp_path / "demo", Family.TEXT)


def test_the_default_place_is_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert demo_checkpoint() == demo_checkpoint()
    assert is_demo_checkpoint(demo_checkpoint(), Family.OMNILMM_12B)
    assert demo_checkpoint().is_relative_to(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError):
        demo_checkpoint()


# -- alive ------------------------------------------------------------------------------------------------


def answer(folder: Path, family: Family, pixels: torch.Tensor, num_tokens: int) -> list[str]:
    """The words of a greedy answer to one question about `pixels`, (1, 3, 448, 448)."""
    config, template = read_model_config(folder), load_template(family, folder)
    model = load_language_model(folder, config, dtype="float32")
    question = Turn("user", (ImagePart(b"", "messages[0]"), TextPart("What is in this picture?")))
    prompt = template.render(Conversation((question,)), InputHandling.SAFE)
    attend, ids = DenseAttend(config.language.num_layers), []
    with torch.inference_mode():
        embeds = model.embed(torch.tensor(prompt.ids))
        (span,) = prompt.spans
        embeds[span.start : span.start + span.length] = load_encoder(folder, config, dtype="float32")(pixels)[0]
        for _ in range(num_tokens):
            positions = torch.arange(len(attend), len(attend) + len(embeds))
            logits = model.logits(model(embeds, positions, attend)[-1:])[0]
            ids.append(int(logits.argmax()))
            embeds = model.embed(torch.tensor(ids[-1:]))
    return [
        template.tokenizer.token_bytes(token_id).decode("utf-8") for token_id in ids if token_id != config.eos_ids[0]
    ]


def test_what_is_built_in_is_the_trained_one_where_it_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "nano_checkpoint", lambda: None)
    assert demo.builtin_checkpoint() == ("omnilmm-demo", demo_checkpoint())
    monkeypatch.setattr(demo, "nano_checkpoint", lambda: tmp_path / "3b")
    assert demo.builtin_checkpoint() == ("omnilmm-nano", tmp_path / "3b")


def test_it_loads_and_answers_in_words_about_the_picture(family: Family, folder: Path) -> None:
    picture = torch.zeros(1, 3, 448, 448)
    words = answer(folder, family, picture, 12)
    assert words == answer(folder, family, picture, 12)
    assert words != answer(folder, family, picture + 0.5, 12)
    assert all(re.fullmatch(r" ?[A-Za-z]+|[\u4e00-\u9fff]+", word) for word in words)


def test_the_picture_shows_an_orange_circle_and_a_blue_square() -> None:
    picture = Image.open(io.BytesIO(demo_picture()))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (320, 240))
    assert picture.getpixel((80, 120)) == (244, 138, 18)
    assert picture.getpixel((240, 120)) == (36, 84, 216)
    assert picture.getpixel((45, 85)) == (250, 250, 250)  # outside the circle, inside its box
    assert picture.getpixel((209, 89)) == (36, 84, 216)  # the square has its corners
