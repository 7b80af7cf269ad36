"""A client that asks for much and reads none of it is cut, and what it held is free again."""

import json
import select
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest
from e2e_cluster import SLOW_READER_S, wait_until

pytestmark = pytest.mark.e2e

MODEL = "omnilmm-3b"
CUT_WITHIN_S = 120.0  # 5 seconds and what the answer takes to fill the buffers, on a machine ten times slower
ASKED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Count."}],
    "max_tokens": 3800,
    "ignore_eos": True,
    "stream": True,
    "logprobs": True,
    "top_logprobs": 10,
}


def request(url: str, body: dict) -> bytes:
    sent = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent


def connect(url: str) -> socket.socket:
    """A connection for which neither kernel buffers much."""
    address = urlsplit(url)
    client = socket.socket()
    client.settimeout(CUT_WITHIN_S)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    client.connect((address.hostname, address.port))
    return client


def read_to_the_end(client: socket.socket) -> None:
    while client.recv(1 << 16):
        pass


def metric(name: str) -> float:
    """The sum of a counter over all processes, from the page that Ray has for Prometheus."""
    import ray

    (node,) = ray.nodes()
    page = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60).text
    lines = [line for line in page.splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_who_does_not_read_is_cut_and_frees_its_seat(cluster):
    with connect(cluster.url) as client:
        client.sendall(request(cluster.url, ASKED))
        assert client.recv(64).startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        ends = select.poll()
        ends.register(client, 0)  # tells of nothing but its end
        assert ends.poll(1000 * CUT_WITHIN_S), "the connection was not cut"
        assert time.monotonic() - begun > SLOW_READER_S / 2, "it was cut for something else"
        with pytest.raises(ConnectionResetError):  # after what had come until then
            read_to_the_end(client)
    wait_until(lambda: cluster.stats(f"decoder-{MODEL}")["num_running"] == 0, "the decoder has a seat more")
    answer = cluster.post({**ASKED, "stream": False, "max_tokens": 4, "top_logprobs": 1})
    assert answer.status_code == 200, answer.text
    wait_until(lambda: metric("ray_omnilmm_slow_readers_cut") >= 1, "the cut is counted")


def test_who_reads_late_but_in_time_has_it_all(cluster):
    """The same client, had it only looked away for a moment."""
    with connect(cluster.url) as client:
        client.sendall(request(cluster.url, ASKED | {"max_tokens": 400}))
        received = client.recv(64)
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() - begun > SLOW_READER_S / 5, "a moment is over")
        while not received.endswith(b"0\r\n\r\n"):
            piece = client.recv(1 << 16)
            assert piece, "the connection was cut"
            received += piece
    assert b"data: [DONE]" in received
