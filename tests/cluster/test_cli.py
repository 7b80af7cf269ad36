"""The command: what it accepts, what it refuses in one line, and a chat without any server."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.local import check_address
from omnilmm.errors import ConfigError
from omnilmm.tenancy.keys import digest_of

OMNILMM = str(Path(sys.executable).with_name("omnilmm"))


def run(*words, **options):
    return subprocess.run(
        [OMNILMM, *map(str, words)], capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_a_new_key_is_shown_with_its_digest():
    said = CliRunner().invoke(app, ["keys", "new", "--tenant", "acme"]).output
    key = said.split("(shown once):")[1].split()[0]
    assert digest_of(key) in said
    assert "tenant: acme" in said


def test_a_chat_in_this_process_streams_rounds(data):
    golden = json.loads((data / "minicpm-v-tiny" / "goldens.json").read_text(encoding="utf-8"))
    case = next(c for c in golden["cases"] if (c["image"], c["conversation"]) == ("cat_alpha.png", "en1"))
    question = golden["conversations"]["en1"][0]["content"]
    options = ("--model", data / "minicpm-v-tiny", "--dtype", "float32", "--input-handling", "original", "--greedy")
    picture = data / "images" / "cat_alpha.png"
    said = run("chat", picture, question, *options, "--max-tokens", 24, input="And?\n\n")
    assert said.returncode == 0, said.stderr
    first, second = said.stdout.strip().split("\n")[:2]
    assert first.strip() == case["greedy"]["text"]
    assert second.strip()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("serve", "--model", "m=/does/not/exist"), "/does/not/exist"),
        (("serve", "--model", "nameless"), "NAME=PATH"),
        (("serve", "--model", "m=x", "--dtype", "int3"), "dtype"),
        (("serve", "--model", "m=x", "--redis", "http://x"), "redis"),
        (("serve", "--model", "m=x", "--host", "0.0.0.0"), "API keys"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(words, complaint, tmp_path):
    said = run(*words, env=None, cwd=tmp_path)
    assert said.returncode != 0
    assert complaint in said.stderr
    assert "Traceback" not in said.stderr


def test_an_address_is_checked_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            check_address("127.0.0.1", taken.getsockname()[1], has_keys=False)
    with pytest.raises(ConfigError, match="API keys"):
        check_address("0.0.0.0", 8000, has_keys=False)
