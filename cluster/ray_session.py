"""Connected to a Ray cluster for as long as a command works on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from cluster.local import RAY_ENVIRONMENT
from omnilmm.errors import ConfigError

MIN_CPUS = 4
LIBRARIES_NEED = ("fsspec", "pandas", "pyarrow")


def missing_packages() -> list[str]:
    """Of what Ray Data and Ray Train import, and Ray itself does without. The extra `batch` brings it."""
    return [name for name in LIBRARIES_NEED if find_spec(name) is None]


@contextmanager
def connected(address: str, *, num_cpus: int) -> Iterator[None]:
    """Within it, this process may ask the cluster for work. `address` is "local" for a cluster of this command's own,
    which ends with it, "auto" for the one of this machine, or a cluster's. One of our own has at least `num_cpus`.

    Raises:
        ConfigError: there is no such cluster.
    """
    is_own = address == "local"
    for name, value in RAY_ENVIRONMENT.items() if is_own else [("RAY_USAGE_STATS_ENABLED", "0")]:
        os.environ.setdefault(name, value)
    import ray

    own: dict[str, Any] = {}
    if is_own:
        own["num_cpus"] = max(os.cpu_count() or 1, MIN_CPUS, num_cpus)
        own["include_dashboard"] = False
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def check_room(wanted: Mapping[str, float], whose: str) -> None:
    """Raises ConfigError where the cluster is too small for that many "CPU" and "GPU", and Ray would wait for machines
    for ever. `whose` they are to be is told, such as "the pools"."""
    import ray

    there = ray.cluster_resources()
    for name, num in wanted.items():
        if there.get(name, 0.0) < num:
            raise ConfigError(f"{whose} need {num:g} {name}s, the cluster has {there.get(name, 0.0):g}")
