"""SIGKILL at any moment loses no line and answers none twice: rows F20 and F24 of the catalogue of faults.

20 seeds in the ordinary run; OMNILMM_CRASH_SEEDS=100 for a thorough one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

LIVES = Path(__file__).with_name("crash_lives.py")


def test_every_line_is_answered_once_however_often_the_worker_is_killed(tmp_path):
    num_seeds = int(os.environ.get("OMNILMM_CRASH_SEEDS", "20"))
    command = [sys.executable, str(LIVES), str(tmp_path), "0", str(num_seeds)]
    environment = os.environ | {"PYTHONPATH": str(LIVES.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    told = [json.loads(row) for row in done.stdout.splitlines() if row.startswith("{")]
    assert len(told) == num_seeds, done.stdout + done.stderr
    assert sum(row["lives"] > 2 for row in told) > num_seeds / 4  # the killing was in earnest
    assert any(row["again"] for row in told)
