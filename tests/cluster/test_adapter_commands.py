"""`omnilmm adapters`: a copy beside the model, or a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from deployments.adapter_folder import RECORD_FILE
from omnilmm.errors import ConfigError, InvalidRequest, NotFound
from omnilmm.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from omnilmm.models.config import read_model_config
from omnilmm.training.config import LoraConfig
from omnilmm.training.lora import Adapter

CHECKPOINT = Path(__file__).parents[1] / "data" / "minicpm-v-tiny"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    Adapter(read_model_config(CHECKPOINT), LoraConfig(r=2, lora_alpha=4.0)).save(folder, base="somewhere")
    return folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def run(tmp_path, folder):
    config = tmp_path / "serve_config.yaml"
    model = {"name": "m", "path": str(CHECKPOINT), "adapters": {"folder": str(folder), "paths": {"fixed": "/nowhere"}}}
    guest = {"name": "guest", "path": str(CHECKPOINT)}
    applications = [
        {"name": "omnilmm", "import_path": "deployments.app:build", "args": {"models": [model]}},
        {"name": "guest", "import_path": "deployments.app:build_model", "args": {"model": guest}},
    ]
    config.write_text(yaml.safe_dump({"applications": applications}))

    def run(*words):
        result = CliRunner().invoke(app, ["adapters", *map(str, words), "--config", str(config)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def test_an_adapter_is_put_beside_the_model_listed_and_removed(run, source, folder):
    told = json.loads(run("add", "m", "legal", source, "--tenant", "acme").output)
    assert told == {"id": "m:legal", "rank": 2, "bytes": (source / WEIGHTS_FILE).stat().st_size}
    config = read_model_config(CHECKPOINT)
    assert read_adapter(folder / "legal", config, max_rank=2, dtype=torch.float32).rank == 2
    assert json.loads((folder / "legal" / RECORD_FILE).read_text())["tenants"] == ["acme"]
    listed = run("list").output
    assert "m:legal" in listed
    assert "acme" in listed
    assert "m:legal" not in run("list", "--model", "guest").output
    run("remove", "m", "legal")
    assert not any(folder.iterdir())


def test_what_cannot_be_is_told(run, source, folder):
    with pytest.raises(InvalidRequest):
        run("add", "m", "../legal", source)
    with pytest.raises(ConfigError):
        run("add", "m", "fixed", source)
    with pytest.raises(ConfigError, match="folder"):
        run("add", "guest", "legal", source)
    assert run("add", "nobody", "legal", source).exit_code == 2
    with pytest.raises(NotFound):
        run("remove", "m", "legal")
    (source / WEIGHTS_FILE).write_bytes(b"\x80\x04.")
    with pytest.raises(InvalidRequest):
        run("add", "m", "legal", source)
    (source / CONFIG_FILE).unlink()
    with pytest.raises(ConfigError, match=CONFIG_FILE):
        run("add", "m", "legal", source)
    assert not any(folder.iterdir())
