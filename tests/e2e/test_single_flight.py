"""One encode per picture in the whole cluster: two routers, two vision replicas, and replicas that die half-way."""

import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import count

import httpx
import psutil
import pytest
import redis
from e2e_cluster import application, data_uri, model_settings, wait_until
from PIL import Image

from deployments.redis_server import RedisServer
from omnilmm.tenancy.keys import new_key

pytestmark = pytest.mark.e2e

APP = "twins"
ROUTER, VISION = "router", "vision-omnilmm-3b"
LEASE_S = 2.0
DEADLINE_S = 60.0
SHADES = count()
ALICE, BOB = new_key(), new_key()


@pytest.fixture(scope="module")
def server():
    with RedisServer() as running:
        yield running


@pytest.fixture(scope="module")
def twins(cluster, data, server):
    """The prefix of an application with two routers, two vision replicas and two tenants."""
    pair = {"autoscaling": {"min_replicas": 2, "max_replicas": 2}}
    model = model_settings(data, "omnilmm-3b") | {"vision": pair}
    model["decoder"] |= {"max_waiting": 1024}  # of one tenant's 200 at once none is refused
    args = {
        "models": [model],
        "router": pair,
        # Everything here runs on one machine's few cores. A Redis that waits for a core is not out.
        "cache": {"redis": server.url, "lease_s": LEASE_S, "timeout_s": 2.0},
        "keys": [{"tenant": name, "sha256": key[1]} for name, key in (("alice", ALICE), ("bob", BOB))],
    }
    with application(APP, args) as prefix:
        assert len(replicas(cluster, ROUTER)) == len(replicas(cluster, VISION)) == 2
        yield prefix


@pytest.fixture
def crowd(cluster, twins):
    """Sends bodies side by side, as many as there are."""
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    with httpx.Client(timeout=DEADLINE_S, limits=limits) as client, ThreadPoolExecutor(256) as pool:

        def send(body: dict, key: str = ALICE[0]) -> Future:
            url, headers = f"{cluster.url}{twins}/v1/chat/completions", {"Authorization": f"Bearer {key}"}
            return pool.submit(client.post, url, json=body, headers=headers)

        yield send


@pytest.fixture
def picture(tmp_path):
    """Makes bodies about pictures nobody has seen."""

    def make() -> dict:
        number = next(SHADES)
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (41, 43), (number % 256, number // 256, 77)).save(path)
        image = {"type": "image_url", "image_url": {"url": data_uri(path)}}
        content = [image, {"type": "text", "text": "What is this?"}]
        body = {"model": "omnilmm-3b", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
        return body | {"temperature": 0, "repetition_penalty": 1.0}

    return make


def replicas(cluster, deployment: str) -> dict[int, dict]:
    """What every replica says of itself, by process id; asked until both have answered."""
    found: dict[int, dict] = {}
    for _ in range(100):
        stats = cluster.stats(deployment, APP)
        found[stats["pid"]] = stats
        if len(found) == 2:
            break
    return found


def num_encodes(cluster) -> int:
    return sum(stats["num_pictures"] for stats in replicas(cluster, VISION).values())


def leases(server) -> list[bytes]:
    with redis.Redis.from_url(server.url) as client:
        return client.keys("omni:lease:*")


def usage(answer: Future) -> dict:
    response = answer.result(DEADLINE_S)
    assert response.status_code == 200, response.text
    return response.json()["usage"]


def source(told: dict) -> str:
    return told["images"][0]["source"]


def is_whole(cluster) -> bool:
    """Whether both pools have two replicas that answer."""
    try:
        return len(replicas(cluster, ROUTER)) == len(replicas(cluster, VISION)) == 2
    except Exception:  # whatever Ray says of a replica that is just going
        return False


def test_two_hundred_at_once_over_two_routers_encode_once(cluster, crowd, server, picture):
    for warm_up in [crowd(picture()) for _ in range(8)]:
        usage(warm_up)
    before = num_encodes(cluster)
    routers = [psutil.Process(pid) for pid in replicas(cluster, ROUTER)]
    idle = [sum(router.cpu_times()[:2]) for router in routers]
    body = picture()
    sources = [source(usage(answer)) for answer in [crowd(body) for _ in range(200)]]
    worked = [sum(router.cpu_times()[:2]) - was for router, was in zip(routers, idle, strict=True)]
    assert num_encodes(cluster) == before + 1
    assert sources.count("encoded") == 1
    assert min(worked) > 0.2 * sum(worked), "both routers took part"
    wait_until(lambda: leases(server) == [], "no lease is left", 10)


@contextmanager
def hanging(crowd, server, picture, pid: int, num_askers: int):
    """A crowd about new pictures, and a vision replica stopped while it has some of them; the rest is answered.

    Gives (body, answers) by picture. The replica goes on at the end, if it still lives.
    """
    for _ in range(8):
        asked = [(body, [crowd(body) for _ in range(num_askers)]) for body in (picture() for _ in range(24))]
        answers = [answer for _, several in asked for answer in several]
        while sum(answer.done() for answer in answers) < len(answers) // 6:
            time.sleep(0.005)
        os.kill(pid, signal.SIGSTOP)
        try:
            await_stillness(answers)
            if leases(server):
                yield asked
                return
        finally:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGCONT)
        wait(answers, DEADLINE_S)
    raise AssertionError("no picture was ever at the stopped replica")


def await_stillness(answers: list[Future]) -> None:
    """Until all answers are there, or none has come for two seconds."""
    num_done, since = -1, time.monotonic()
    while time.monotonic() - since < 2.0 and num_done < len(answers):
        now_done = sum(answer.done() for answer in answers)
        if now_done != num_done:
            num_done, since = now_done, time.monotonic()
        time.sleep(0.02)


def test_a_vision_replica_killed_half_way_is_no_ones_error(cluster, crowd, server, picture):
    for warm_up in [crowd(picture()) for _ in range(100)]:  # so that retries are saved up
        usage(warm_up)
    doomed, _ = replicas(cluster, VISION).values()
    with hanging(crowd, server, picture, doomed["pid"], num_askers=4) as asked:
        os.kill(doomed["pid"], signal.SIGKILL)
    for _, answers in asked:
        assert [source(usage(answer)) for answer in answers].count("encoded") == 1
    wait_until(lambda: leases(server) == [], "no lease is left", 10)
    wait_until(lambda: is_whole(cluster), "both are back")


def test_a_router_killed_while_its_pictures_are_encoded_costs_one_more_encode_at_most(cluster, crowd, server, picture):
    """The router leads, as far as the leases go. Its own clients lose their answers and ask again."""
    before, num_before = num_encodes(cluster), next(SHADES)
    slow, doomed = next(iter(replicas(cluster, VISION))), next(iter(replicas(cluster, ROUTER)))
    with hanging(crowd, server, picture, slow, num_askers=6) as asked:
        os.kill(doomed, signal.SIGKILL)
        killed = time.monotonic()
    lost = [body for body, answers in asked for answer in answers if not is_answered(answer)]
    assert len(lost) < sum(len(answers) for _, answers in asked), "the other router's clients have their answers"
    for answer in [crowd(body) for body in lost]:
        usage(answer)
    assert time.monotonic() - killed < DEADLINE_S
    wait_until(lambda: leases(server) == [], "no lease is left", 10)
    num_pictures = next(SHADES) - num_before - 1
    assert num_pictures <= num_encodes(cluster) - before <= 2 * num_pictures
    wait_until(lambda: is_whole(cluster), "both are back")


def is_answered(answer: Future) -> bool:
    """False where the router that had it died."""
    try:
        response = answer.result(DEADLINE_S)
    except httpx.TransportError:
        return False
    assert response.status_code in (200, 500, 503), response.text
    return response.status_code == 200


def test_anothers_picture_is_a_new_one(cluster, crowd, picture):
    """tests/cache/test_tenants.py shows it command by command, tests/bench/timing_probe.py by the clock."""
    body = picture()
    assert source(usage(crowd(body))) == "encoded"
    before = num_encodes(cluster)
    anothers, new = usage(crowd(body, BOB[0])), usage(crowd(picture(), BOB[0]))
    assert num_encodes(cluster) == before + 2
    assert source(anothers) == source(new) == "encoded"
    assert anothers["prompt_tokens_details"] == new["prompt_tokens_details"], "nor is anything of it in the KV cache"
    assert source(usage(crowd(body))) != "encoded"
