"""Last of all: SIGTERM, as a supervisor sends it, lets the answers under way come to their end, stops everything, and
leaves nothing behind. Ctrl-C is treated alike."""

import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from e2e_cluster import disconnect

pytestmark = pytest.mark.e2e


NUM_STREAMS = 4


def stream(cluster, begun):
    """The last line of a long answer; `begun` is told when it has begun."""
    asked = {
        "model": "omnilmm-3b",
        "messages": [{"role": "user", "content": "Tell me everything."}],
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
    }
    last = None
    with httpx.stream("POST", f"{cluster.url}/v1/chat/completions", json=asked, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {") and last is None:
                begun.release()
            last = line or last
    return last


def test_sigterm_leaves_no_process_and_no_socket(cluster):
    logs = Path(re.search(r"logs: (\S+)", cluster.await_line("Ray is up at", 5)).group(1))
    (private,) = [folder for folder in logs.parents if folder.name.startswith("omnilmm-")]
    family = psutil.Process(cluster.process.pid).children(recursive=True)
    assert len(family) > 5
    disconnect()
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(stream, cluster, begun) for _ in range(NUM_STREAMS)]
        for _ in streams:
            assert begun.acquire(timeout=60)
        assert not any(future.done() for future in streams), "too quick to be interrupted"
        cluster.process.send_signal(signal.SIGTERM)
        assert [future.result(timeout=120) for future in streams] == ["data: [DONE]"] * NUM_STREAMS
    assert cluster.process.wait(60) == 0
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert not alive, [process.cmdline() for process in alive]
    assert gone
    assert not private.exists()
