"""What a library or a power of the process may be used for, by name and place. Everything else stays out."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import pytest
from sources import Source, house, is_under, references, report

MODELS = ("omnilmm/models/", "omnilmm/training/")


@dataclass(frozen=True)
class Border:
    """`names` (and everything inside them) may appear only in `homes`; `words` may be imported by name anywhere."""

    what: str
    names: tuple[str, ...]
    homes: tuple[str, ...]
    words: tuple[str, ...] = ()  # exceptions and the like: to name one is no use of the power behind it


BORDERS = (
    Border(
        "tensors",
        ("torch",),
        (
            *MODELS,
            "omnilmm/encoder/encode.py",
            "omnilmm/encoder/graphs.py",
            "omnilmm/engine/held.py",
            "omnilmm/engine/kv.py",
            "omnilmm/engine/batch.py",
            "omnilmm/engine/paged.py",
            "omnilmm/engine/graphs.py",
            "omnilmm/engine/backend.py",
            "omnilmm/engine/sampling.py",
            "omnilmm/engine/runner.py",
            "cluster/",
        ),
    ),
    Border("checkpoints", ("safetensors",), (*MODELS, "cluster/")),
    Border("other people's model code", ("transformers",), MODELS),
    Border("downloads", ("huggingface_hub",), ("omnilmm/models/", "cluster/")),
    Border("the cluster", ("ray",), ("deployments/", "cluster/")),
    Border(
        "validation",
        ("pydantic",),
        ("omnilmm/api/", "deployments/settings.py"),
        words=("pydantic.ValidationError",),  # what a settings file that is wrong raises
    ),
    Border("the web framework", ("fastapi", "starlette", "uvicorn"), ("deployments/",)),
    Border(
        "the environment",
        ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"),
        ("deployments/settings.py", "cluster/"),
    ),
    Border(
        "threads and processes of our own",
        (
            "threading",
            "_thread",
            "queue",
            "concurrent.futures",
            "multiprocessing",
            "asyncio.to_thread",
            "anyio.to_thread",
            "starlette.concurrency",
            "fastapi.concurrency",
            "?.run_in_executor",
        ),
        (
            "omnilmm/encoder/loop.py",
            "omnilmm/engine/loop.py",
            "omnilmm/image/",
            "omnilmm/models/device.py",
            "deployments/database.py",
        ),
        words=("threading.Event",),  # what a signal handler sets and the main thread waits for
    ),
    Border(
        "objects made from bytes",
        (
            "pickle",
            "_pickle",
            "cPickle",
            "cloudpickle",
            "dill",
            "joblib",
            "marshal",
            "shelve",
            "ray.cloudpickle",
            "torch.package",
            "torch.serialization",
        ),
        (),
        words=("pickle.UnpicklingError",),  # raised by torch.load(weights_only=True)
    ),
    Border("code from elsewhere", ("torch.hub", "torch.jit.load", "runpy", "code.interact"), ()),
    Border(
        "requests to other servers",
        ("requests", "urllib.request", "urllib3", "http.client", "httpx", "aiohttp", "openai", "pycurl"),
        # the first two talk to our own cluster; pictures come from elsewhere through one guarded door
        ("omnilmm/chat.py", "cluster/", "omnilmm/image/remote.py"),
        words=("httpx.HTTPError",),  # raised by huggingface_hub
    ),
)


def check_borders(source: Source) -> list[str]:
    """Names this file uses beyond their borders."""
    used = [*references(source), *_methods(source)]
    return sorted(
        {
            source.at(node, f"uses {name}: {border.what}")
            for border in BORDERS
            if not source.lives_in(border.homes)
            for name, node in used
            if name not in border.words and any(is_under(name, forbidden) for forbidden in border.names)
        }
    )


def _methods(source: Source) -> list[tuple[str, ast.AST]]:
    """Attributes by their last name alone, for methods that are forbidden whatever object they belong to."""
    return [(f"?.{node.attr}", node) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]


def test_the_borders_are_kept() -> None:
    broken = [line for source in house() for line in check_borders(source)]
    assert not broken, report(broken)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("omnilmm/cache/codec.py", "import torch"),
        ("omnilmm/engine/scheduler.py", "from torch.nn import functional"),
        ("omnilmm/engine/loop.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
        ("deployments/vision.py", "import torch"),
        ("omnilmm/prompt/tokens.py", "def f():\n    from transformers import AutoTokenizer"),
        ("omnilmm/encoder/encode.py", "from safetensors.torch import load_file"),
        ("omnilmm/flow.py", "import ray"),
        ("omnilmm/pipeline.py", "from ray import serve"),
        ("omnilmm/messages.py", "from pydantic import BaseModel"),
        ("deployments/router.py", "import pydantic"),
        ("omnilmm/api/requests.py", "from fastapi import Request"),
        ("omnilmm/config.py", "import os\nx = os.environ['HOME']"),
        ("deployments/app.py", "from os import getenv as ask"),
        ("deployments/app.py", "import os as system\nsystem.getenv('A')"),
        ("omnilmm/flow.py", "from threading import Lock"),
        ("omnilmm/cache/redis.py", "import asyncio\nasync def f(g):\n    await asyncio.to_thread(g)"),
        ("deployments/router.py", "async def f(loop):\n    await loop.run_in_executor(None, print)"),
        ("omnilmm/engine/runner.py", "from concurrent.futures import ThreadPoolExecutor"),
        ("omnilmm/cache/codec.py", "import pickle"),
        ("cluster/cli.py", "from ray import cloudpickle"),
        ("omnilmm/models/weights.py", "import torch\ntorch.serialization.add_safe_globals([int])"),
        ("omnilmm/models/weights.py", "import torch\ntorch.hub.load('a', 'b')"),
        ("omnilmm/batch/state.py", "import marshal, shelve"),
        ("omnilmm/models/weights.py", "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass"),
        ("omnilmm/image/source.py", "import urllib.request"),
        ("omnilmm/image/source.py", "import urllib\nurllib.request.urlopen('http://x')"),
        ("deployments/router.py", "from httpx import AsyncClient"),
    ],
)
def test_a_step_over_a_border_is_found(path: str, text: str) -> None:
    assert check_borders(Source.parse(path, text)) != []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("omnilmm/models/weights.py", "import torch\nfrom safetensors import safe_open"),
        ("omnilmm/engine/kv.py", "import torch"),
        ("deployments/app.py", "from ray import serve"),
        ("omnilmm/api/requests.py", "from pydantic import BaseModel"),
        ("deployments/settings.py", "import os\nx = os.environ.get('A')"),
        ("omnilmm/engine/loop.py", "import threading\nimport queue"),
        ("omnilmm/chat.py", "import httpx"),
        ("omnilmm/image/source.py", "from urllib.parse import urlsplit"),
        ("omnilmm/models/weights.py", "from pickle import UnpicklingError\nfrom httpx import HTTPError"),
        ("omnilmm/flow.py", "import asyncio\nq = asyncio.Queue\nimport os.path"),
        ("omnilmm/api/responses.py", "def f(torch):\n    return torch.load"),
    ],
)
def test_what_is_at_home_passes(path: str, text: str) -> None:
    assert check_borders(Source.parse(path, text)) == []
