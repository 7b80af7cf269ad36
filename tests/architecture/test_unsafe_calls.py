"""Calls that would run other people's code or build objects from bytes we did not write."""

from __future__ import annotations

import ast

import pytest
from sources import Source, full_names, house, report

RUNS_TEXT = ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec")
LOADS_YAML = ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all")


def check_calls(source: Source) -> list[str]:
    """Calls of this file that are never right here."""
    broken = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            broken += [source.at(node, problem) for problem in _problems(source, node)]
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            broken.append(source.at(node, "trust_remote_code"))
        elif isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            broken.append(source.at(node, "write torch.load in full"))
    return broken


def _problems(source: Source, call: ast.Call) -> list[str]:
    names = full_names(source, call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    problems = [name for name in names if name in RUNS_TEXT]
    problems += [f"{name}: use yaml.safe_load" for name in names if name in LOADS_YAML]
    if "torch.load" in names and not _is_literally(keywords.get("weights_only"), True):
        problems.append("torch.load without weights_only=True")
    if "trust_remote_code" in keywords:
        problems.append("trust_remote_code")
    if "allow_pickle" in keywords and not _is_literally(keywords["allow_pickle"], False):
        problems.append("allow_pickle")
    if _is_literally(keywords.get("shell"), True):
        problems.append("a command line for a shell")
    return problems


def _is_literally(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_unsafe_call_is_made() -> None:
    broken = [line for source in house() for line in check_calls(source)]
    assert not broken, report(broken)


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "import torch as t\nt.load(path, map_location='cpu')",
        "from torch import load",
        "x = eval('1')",
        "exec(text)",
        "import builtins\nbuiltins.exec(text)",
        "__import__(name)",
        "load(path, trust_remote_code=True)",
        "load(path, trust_remote_code=False)",
        "options = {'trust_remote_code': True}",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
)
def test_an_unsafe_call_is_found(text: str) -> None:
    assert check_calls(Source.parse("omnilmm/models/weights.py", text)) != []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True, mmap=True)",
        "model.eval()",
        "import re\nre.compile('a')",
        "import yaml\nyaml.safe_load(text)",
        "import json\njson.load(file)",
    ],
)
def test_safe_calls_pass(text: str) -> None:
    assert check_calls(Source.parse("omnilmm/models/weights.py", text)) == []
