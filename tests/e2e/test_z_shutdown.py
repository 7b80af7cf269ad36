"""Last of all: Ctrl-C stops everything and leaves nothing behind."""

import re
import signal
from pathlib import Path

import psutil
import pytest
from e2e_cluster import disconnect

pytestmark = pytest.mark.e2e


def test_ctrl_c_leaves_no_process_and_no_socket(cluster):
    logs = Path(re.search(r"logs: (\S+)", cluster.await_line("Ray is up at", 5)).group(1))
    (private,) = [folder for folder in logs.parents if folder.name.startswith("omnilmm-")]
    family = psutil.Process(cluster.process.pid).children(recursive=True)
    assert len(family) > 5
    disconnect()
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(30) == 0
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert not alive, [process.cmdline() for process in alive]
    assert gone
    assert not private.exists()
