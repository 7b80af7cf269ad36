"""Embeddings are made once: counted at the vision pool, told in `usage.images`."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from e2e_cluster import data_uri, wait_until
from PIL import Image

pytestmark = pytest.mark.e2e


def new_picture(folder, colour):
    path = folder / "picture.png"
    Image.new("RGB", (31, 17), colour).save(path)
    return data_uri(path)


def ask(cluster, model, messages, **changes):
    body = {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0, **changes}
    response = cluster.post(body)
    assert response.status_code == 200, response.text
    document = response.json()
    return document["choices"][0]["message"]["content"], document["usage"]


def opening(url, words):
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words}]}
    ]


def source(usage):
    return [image["source"] for image in usage["images"]]


def test_five_turns_about_one_picture_encode_it_once(cluster, tmp_path):
    before = cluster.num_encodes("omnilmm-3b")
    messages = opening(new_picture(tmp_path, (200, 30, 40)), "What is this?")
    seen = []
    for turn in range(5):
        answer, usage = ask(cluster, "omnilmm-3b", messages)
        seen.append((source(usage), usage["prompt_tokens_details"]["cached_tokens"]))
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"And then {turn}?"}]
    assert cluster.num_encodes("omnilmm-3b") == before + 1
    assert [s for s, _ in seen] == [["encoded"], ["kv"], ["kv"], ["kv"], ["kv"]]
    assert all(cached >= 64 for _, cached in seen[1:])


def test_the_same_picture_in_another_conversation_is_not_encoded_again(cluster, tmp_path):
    url = new_picture(tmp_path, (1, 200, 40))
    ask(cluster, "omnilmm-3b", opening(url, "What is this?"))
    before = cluster.num_encodes("omnilmm-3b")
    front = [{"role": "system", "content": "Be brief."}]
    second = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, *opening(url, "Well?")]
    _, usage = ask(cluster, "omnilmm-3b", front + second)
    assert source(usage) == ["cache"]
    assert cluster.num_encodes("omnilmm-3b") == before


def test_many_at_once_about_a_new_picture_encode_it_once(cluster, tmp_path):
    url = new_picture(tmp_path, (9, 9, 200))
    before = cluster.num_encodes("omnilmm-3b")
    with ThreadPoolExecutor(24) as pool:
        usages = [
            u for _, u in pool.map(lambda i: ask(cluster, "omnilmm-3b", opening(url, f"Question {i}")), range(24))
        ]
    assert cluster.num_encodes("omnilmm-3b") == before + 1
    assert sum(source(usage) == ["encoded"] for usage in usages) == 1


def test_several_pictures_and_pictures_in_later_turns(cluster, tmp_path):
    first, second = new_picture(tmp_path, (5, 5, 5)), None
    second = new_picture(tmp_path, (250, 250, 5))
    picture = [{"type": "image_url", "image_url": {"url": url}} for url in (first, second, first)]
    together = [{"role": "user", "content": [*picture, {"type": "text", "text": "Compare them."}]}]
    before = cluster.num_encodes("omnilmm-3b")
    answer, usage = ask(cluster, "omnilmm-3b", together)
    assert source(usage) == ["encoded"] * 3
    assert usage["prompt_tokens_details"]["image_tokens"] == 3 * 64
    assert cluster.num_encodes("omnilmm-3b") == before + 2
    third = new_picture(tmp_path, (70, 0, 70))
    later = [*together, {"role": "assistant", "content": answer}, *opening(third, "And this?")]
    _, usage = ask(cluster, "omnilmm-3b", later)
    assert source(usage) == ["kv", "kv", "kv", "encoded"]


def test_words_alone_need_no_picture(cluster):
    _, usage = ask(cluster, "omnilmm-12b", [{"role": "user", "content": "Hello"}])
    assert usage["images"] == []


def test_a_sleeping_vision_pool_is_not_woken_by_a_known_picture(cluster, tmp_path):
    url = new_picture(tmp_path, (120, 130, 140))
    _, usage = ask(cluster, "omnilmm-12b", opening(url, "What is this?"))
    assert source(usage) == ["encoded"]
    wait_until(lambda: cluster.num_replicas("vision-omnilmm-12b") == 0, "the vision pool sleeps", 90)
    other_opening = [{"role": "system", "content": "Be brief."}, *opening(url, "What is this?")]
    _, usage = ask(cluster, "omnilmm-12b", other_opening)
    assert source(usage) == ["cache"]
    assert cluster.num_replicas("vision-omnilmm-12b") == 0
    _, usage = ask(cluster, "omnilmm-12b", opening(new_picture(tmp_path, (1, 2, 3)), "And this?"))
    assert source(usage) == ["encoded"], "a new picture wakes it"


def test_a_restart_of_every_replica_loses_no_embedding(cluster, tmp_path):
    import os
    import signal

    from ray import serve

    url = new_picture(tmp_path, (77, 88, 99))
    _, usage = ask(cluster, "omnilmm-3b", opening(url, "What is this?"))
    assert source(usage) == ["encoded"]
    old = {name: cluster.stats(name)["pid"] for name in ("router", "vision-omnilmm-3b", "decoder-omnilmm-3b")}
    for pid in old.values():
        os.kill(pid, signal.SIGKILL)

    def all_new() -> bool:
        states = serve.status().applications["omnilmm"].deployments
        return all(states[name].status == "HEALTHY" and is_answering(name) for name in old)

    def is_answering(name: str) -> bool:
        try:
            return cluster.stats(name)["pid"] != old[name]
        except Exception:
            return False

    wait_until(all_new, "every replica has been replaced", 120)

    def is_ready() -> bool:
        try:
            return httpx.get(f"{cluster.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(is_ready, "the router answers again", 60)
    _, usage = ask(cluster, "omnilmm-3b", opening(url, "What is this?"))
    assert source(usage) == ["cache"]
    assert cluster.num_encodes("omnilmm-3b") == 0
