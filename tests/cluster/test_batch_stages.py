"""The two stages of a batch on a cluster, without the cluster: they answer as one process does."""

import asyncio
import base64
import json

import pytest

from cluster.batch_ray import MAX_LINES, Pools, answer_rows_on_ray, bundles, parcel_schema, result_schema
from cluster.batch_service import Load, LocalService
from cluster.batch_stages import DecodeStage, EncodeStage
from omnilmm.batch.offline import Progress, answer_rows
from omnilmm.batch.order import Place, in_order
from omnilmm.batch.sources import CHAT, Row
from omnilmm.config import EngineConfig, InputHandling
from omnilmm.pipeline import Pipeline

pyarrow = pytest.importorskip("pyarrow")

ENGINE = EngineConfig(num_blocks=256, max_sequences=8)
SECRET = b"s" * 32


def url(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def row(number, words, *pictures, **fields):
    parts = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]
    body = {"model": "m", "messages": messages, "max_tokens": 4, "temperature": 0, **fields}
    first = (pictures[0] if pictures else "")[-40:].encode()
    return Row(number, f"r{number}", CHAT, Place(first, first, b"", ""), lambda: body)


def rows(data):
    coins, cat = url(data / "images" / "coins_gray.png"), url(data / "images" / "cat_alpha.png")
    return [
        row(1, "What is it?", coins),
        row(2, "How many?", coins),
        row(3, "What is it?", cat, coins),
        row(4, "Hello"),
        row(5, "What is it?", "data:image/png;base64," + base64.b64encode(b"nothing").decode()),
        row(6, "What is it?", "https://somewhere.example/a.png"),
        row(7, "What is it?", coins, max_tokens=10**6),
        row(8, "What is it?", coins, surprise=1),
        row(9, "And now?", coins),
    ]


def told(result):
    """A line without what differs between any two runs."""
    line = json.loads(result)
    body = line["response"]["body"]
    shown = body.get("error") or {
        "text": body["choices"][0]["message"]["content"],
        "finish": body["choices"][0]["finish_reason"],
        "tokens": [body["usage"][name] for name in ("prompt_tokens", "completion_tokens")],
        "sizes": [(image["width"], image["height"]) for image in body["usage"]["images"]],
    }
    return line["custom_id"], line["response"]["status_code"], shown


def num_encoded(results):
    usages = [json.loads(result)["response"]["body"].get("usage", {}) for result in results]
    return sum(image["source"] == "encoded" for usage in usages for image in usage.get("images", []))


@pytest.fixture
def load(data):
    return Load(str(data / "minicpm-v-tiny"), "m", "float32", "cpu", InputHandling.SAFE, ENGINE)


def as_on_the_wire(parcel):
    """What Arrow makes of a parcel between two processes."""
    return pyarrow.Table.from_pylist([parcel], schema=parcel_schema()).to_pylist()[0]


async def in_two_stages(load, asked, *, max_lines):
    encode, decode = EncodeStage(load, SECRET), DecodeStage(load, SECRET, max_running=4)
    try:
        parcels = [as_on_the_wire(parcel) for parcel in await encode.pack(asked, max_lines=max_lines)]
        answers = [line for parcel in parcels for line in await decode.answer(parcel)]
    finally:
        await encode.aclose()
        await decode.aclose()
    return parcels, pyarrow.Table.from_pylist(answers, schema=result_schema()).to_pylist()


async def in_one_process(load, asked, folder):
    done = []
    async with Pipeline.load(load.path, name="m", dtype="float32", engine=ENGINE) as pipeline:
        service = LocalService.over(pipeline, "m")
        progress = Progress(folder / "p", "f")
        await answer_rows(asked, service.ask, progress, max_running=4, tell=done.append)
        progress.remove()
        await service.aclose()
    return done


async def test_two_stages_answer_as_one_process_does(load, data, tmp_path):
    asked = rows(data)
    wanted = {entry.row.number: entry for entry in await in_one_process(load, asked, tmp_path)}
    parcels, answers = await in_two_stages(load, asked, max_lines=4)
    assert [len(parcel["lines"]) for parcel in parcels] == [4, 4, 1]
    assert {line["number"] for line in answers} == set(wanted)
    for line in answers:
        assert told(line["result"]) == told(wanted[line["number"]].result)
        assert line["is_success"] == (wanted[line["number"]].body is not None)
    assert num_encoded([line["result"] for line in answers]) == 2  # two pictures, three parcels
    assert num_encoded([entry.result for entry in wanted.values()]) == 2


async def test_a_picture_travels_once_however_many_ask(load, data):
    coins = url(data / "images" / "coins_gray.png")
    (parcel,), _ = await in_two_stages(load, [row(i, f"{i}?", coins) for i in range(6)], max_lines=16)
    assert [len(parcel[name]) for name in ("lines", "files", "pictures", "vectors")] == [6, 1, 1, 1]
    assert all(coins not in line["body"].decode() for line in parcel["lines"])


async def test_a_row_that_cannot_be_read_costs_itself(load):
    def broken():
        raise RuntimeError("secret")

    bad = Row(1, "bad", CHAT, Place(b"", b"", b"", ""), broken)
    encode = EncodeStage(load, SECRET)
    encode._pace._sleep = lambda seconds: asyncio.sleep(0)
    (parcel,) = await encode.pack([bad, row(2, "hello")], max_lines=16)
    await encode.aclose()
    assert told(parcel["lines"][0]["refused"])[:2] == ("bad", 500)
    assert "secret" not in str(parcel)
    assert parcel["lines"][1]["refused"] is None


def test_rows_about_one_picture_are_never_parted():
    places = [b"a"] * 3 + [b"b"] * (MAX_LINES + 5) + [b""] * (2 * MAX_LINES) + [b"c"]
    asked = in_order([Row(i, str(i), CHAT, Place(p, p, b"", ""), dict) for i, p in enumerate(places)])
    heaps = bundles(asked)
    assert sorted(number for heap in heaps for number in heap) == list(range(len(places)))
    for picture in (b"a", b"b", b"c"):
        assert sum(any(places[number] == picture for number in heap) for heap in heaps) == 1
    assert all(len(heap) <= MAX_LINES for heap in heaps if places[heap[0]] != b"b")


def test_a_run_that_is_done_needs_no_cluster(tmp_path, load):
    progress = Progress(tmp_path / "p", "f")
    asked = row(1, "hello")
    progress.add(asked, b"{}", is_success=True)
    answer_rows_on_ray([asked], load, progress, Pools("nowhere:1"), max_running=4, tell=lambda done: None)
    progress.remove()
