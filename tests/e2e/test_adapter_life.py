"""An adapter that an admin uploads to a running cluster answers at once, as the merged model does, and goes quietly."""

import json
from pathlib import Path

import httpx
import pytest
import torch
from e2e_cluster import application, model_settings

from cluster.train import merge_adapter
from omnilmm.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from omnilmm.models.config import read_model_config
from omnilmm.tenancy.keys import new_key
from omnilmm.training.config import LoraConfig
from omnilmm.training.lora import Adapter

pytestmark = pytest.mark.e2e

BASE = "omnilmm-3b"
LONG = 300


def make_adapter(checkpoint, folder):
    torch.manual_seed(3)
    adapter = Adapter(read_model_config(checkpoint), LoraConfig(r=3, lora_alpha=9.0)).requires_grad_(False)
    for up in adapter.up:
        torch.nn.init.normal_(up, std=0.3)
    folder.mkdir()
    adapter.save(folder, base="")


def test_an_adapter_is_uploaded_used_and_deleted(cluster, data, golden, tmp_path):
    made, stored, merged = (tmp_path / name for name in ("made", "adapters", "merged"))
    settings = model_settings(data, BASE)
    checkpoint = Path(settings["path"])
    make_adapter(checkpoint, made)
    stored.mkdir()
    merge_adapter(checkpoint, made, merged, dtype="float32")
    (admin, admin_digest), (mine, my_digest), (theirs, their_digest) = new_key(), new_key(), new_key()
    args = {
        "models": [
            settings | {"adapters": {"folder": str(stored)}},
            settings | {"name": "merged", "path": str(merged)},
        ],
        "keys": [{"tenant": "acme", "sha256": my_digest}, {"tenant": "other", "sha256": their_digest}],
        "admin": {"keys": [admin_digest]},
        "cache": {"redis": "none"},
    }
    case = golden(BASE, "cat_alpha.png", "en1")
    with application("adapted", args) as prefix:
        adapters = f"{cluster.url}{prefix}/admin/v1/adapters/{BASE}"
        as_admin = {"Authorization": f"Bearer {admin}"}

        def ask(model, key=mine, **changes):
            headers = {"Authorization": f"Bearer {key}"}
            return cluster.post(case.body(model=model, **changes), prefix, headers=headers)

        def text_of(response):
            assert response.status_code == 200, response.text
            return response.json()["choices"][0]["message"]["content"]

        assert ask(f"{BASE}:new").status_code == 404
        form = {"name": "new", "tenants": "acme", "adapter_config": (made / CONFIG_FILE).read_text()}
        files = {"file": (made / WEIGHTS_FILE).read_bytes()}
        cut = httpx.post(adapters, data=form, files={"file": files["file"][:-8]}, headers=as_admin)
        assert (cut.status_code, cut.json()["error"]["code"]) == (400, "invalid_adapter")
        assert httpx.post(adapters, data=form, files=files, headers=as_admin).status_code == 201

        answer = text_of(ask(f"{BASE}:new"))
        assert answer == text_of(ask("merged"))
        assert text_of(ask(BASE)) == case.text
        assert answer != case.text
        assert ask(f"{BASE}:new", theirs).status_code == 404

        long = case.body(model=f"{BASE}:new", stream=True, max_tokens=LONG, ignore_eos=True)
        long |= {"stream_options": {"include_usage": True}}
        headers = {"Authorization": f"Bearer {mine}"}
        url = f"{cluster.url}{prefix}/v1/chat/completions"
        with httpx.stream("POST", url, json=long, headers=headers, timeout=120) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            gone = httpx.delete(f"{adapters}/new", headers=as_admin)
            assert gone.json()["status"] == "deleted"
            assert ask(f"{BASE}:new").status_code == 404
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["usage"]["completion_tokens"] == LONG
        assert not any(stored.iterdir())
        assert text_of(ask(BASE)) == case.text
