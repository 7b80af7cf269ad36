"""`omnilmm batch run --ray` on the shared cluster: the same rows come out as without Ray, also after a stop."""

import csv
import json
import re
import signal
import subprocess
import sys

import pytest
from e2e_cluster import FAMILIES, wait_until

pytest.importorskip("ray.data")

pytestmark = pytest.mark.e2e

NUM_ROWS = 48
COLUMNS = ("custom_id", "answer", "finish_reason", "prompt_tokens", "completion_tokens", "error", "error_code")


@pytest.fixture
def command(data, tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "number"])
        for number in range(NUM_ROWS):
            image = ("coins_gray.png", "cat_alpha.png", "nothing.png")[number % 3]
            rows.writerow([data / "images" / image, number])
    options = ["--model", data / FAMILIES["omnilmm-3b"], "--dtype", "float32", "--greedy", "--max-tokens", 12]
    options += ["--prompt", "What is {number}?", "--kv-blocks", 256, "--concurrency", 8]

    def make(output, *more):
        words = ["batch", "run", tmp_path / "rows.csv", tmp_path / output, *options, *more]
        return [sys.executable, "-m", "cluster.cli", *map(str, words)]

    return make


def answers(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: row[name] for name in COLUMNS} for row in rows]


def test_rows_come_out_as_without_ray_also_after_a_stop(cluster, command, tmp_path):
    address = re.search(r"Ray is up at (\S+)", cluster.await_line("Ray is up at", 5)).group(1)
    here = subprocess.run(command("here.jsonl"), capture_output=True, text=True, timeout=120, check=False)
    assert here.returncode == 0, here.stderr
    on_ray = command("ray.jsonl", "--ray", address)
    journal = tmp_path / "ray.jsonl.progress"
    first = subprocess.Popen(on_ray, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: num_records(journal) > 0 or first.poll() is not None, "a row is answered", 120)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(30)
    kept = num_records(journal)
    assert kept > 0
    second = subprocess.run(on_ray, capture_output=True, text=True, timeout=200, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert answers(tmp_path / "ray.jsonl") == answers(tmp_path / "here.jsonl")
    told = answers(tmp_path / "ray.jsonl")
    assert len({row["custom_id"] for row in told}) == len(told) == NUM_ROWS
    assert sum(row["error_code"] == "invalid_image_url" for row in told) == NUM_ROWS // 3
    assert not journal.exists()


def num_records(journal):
    return sum(path.read_bytes().count(b"\n") for path in journal.glob("journal.*"))
