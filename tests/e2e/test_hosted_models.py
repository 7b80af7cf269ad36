"""Models that come, change and go while the others answer: edited in serve_config.yaml, taken up at SIGHUP."""

import json
import signal

import httpx
import pytest
import yaml
from e2e_cluster import model_settings, wait_until

pytestmark = pytest.mark.e2e

LONG = 600


def rewrite(cluster, guest):
    """The file as it was, with `guest` (settings of a model, or None) as an application of its own; then SIGHUP."""
    document = yaml.safe_load(cluster.config.read_text())
    document["applications"] = document["applications"][:1]
    if guest is not None:
        args = {"model": guest}
        document["applications"].append(
            {"name": "guest", "import_path": "deployments.app:build_model", "args": args, "route_prefix": None}
        )
    cluster.config.write_text(yaml.safe_dump(document))
    cluster.process.send_signal(signal.SIGHUP)


def names(cluster):
    return {model["id"] for model in httpx.get(f"{cluster.url}/v1/models").json()["data"]}


def pids(cluster):
    return [cluster.stats(name)["pid"] for name in ("router", "vision-omnilmm-3b", "decoder-omnilmm-3b")]


def test_a_model_comes_changes_and_goes_and_the_others_do_not_notice(cluster, data, golden):
    case = golden("omnilmm-3b", "cat_alpha.png", "en1")
    guest = model_settings(data, "omnilmm-3b") | {"name": "guest"}
    before = pids(cluster)

    rewrite(cluster, guest)
    wait_until(lambda: "guest" in names(cluster), "the new model is offered")
    asked = case.body(model="guest")
    assert cluster.post(asked).json()["choices"][0]["message"]["content"] == case.text

    long = case.body(stream=True, max_tokens=LONG, ignore_eos=True, stream_options={"include_usage": True})
    with httpx.stream("POST", f"{cluster.url}/v1/chat/completions", json=long, timeout=120) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        was = cluster.stats("decoder-guest", "guest")["pid"]
        rewrite(cluster, guest | {"decoder": {"num_blocks": 256}})
        wait_until(lambda: cluster.stats("decoder-guest", "guest")["pid"] != was, "the changed model runs")
        assert cluster.post(asked).json()["choices"][0]["message"]["content"] == case.text
        rewrite(cluster, None)
        wait_until(lambda: "guest" not in names(cluster), "the model is gone")
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == LONG

    assert cluster.post(asked).status_code == 404
    assert cluster.post(case.body()).json()["choices"][0]["message"]["content"] == case.text
    assert pids(cluster) == before
