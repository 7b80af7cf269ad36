"""What serve_config.yaml may say, and what it may not."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments.settings import CACHE_SECRET_VARIABLE, AppSettings, Cache, DecoderPool, cache_secret
from omnilmm.errors import ConfigError
from omnilmm.messages import Priority

ROOT = Path(__file__).parents[2]
MODEL = {"name": "m", "path": "somewhere"}


def test_the_checked_in_file_is_valid():
    document = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    (application,) = document["applications"]
    settings = AppSettings.model_validate(application["args"])
    assert application["import_path"] == "deployments.app:build"
    assert document["http_options"]["host"] == "127.0.0.1"
    assert (ROOT / settings.models[0].path / "config.json").exists()


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"models": []},
        {"models": [MODEL, MODEL]},
        {"models": [MODEL | {"nam": "typo"}]},
        {"models": [MODEL | {"dtype": "int3"}]},
        {"models": [MODEL | {"decoder": {"weight_dtype": "int3"}}]},
        {"models": [MODEL | {"device": "cuda", "decoder": {"weight_dtype": "int8"}}]},
        {"models": [MODEL | {"decoder": {"attention": "flash"}}]},
        {"models": [MODEL | {"device": "cpu", "decoder": {"attention": "paged"}}]},
        {"models": [MODEL | {"device": "cpu", "decoder": {"cuda_graphs": True}}]},
        {"models": [MODEL | {"device": "cpu", "vision": {"cuda_graphs": True}}]},
        {"models": [MODEL | {"decoder": {"cuda_graphs": True, "attention": "gathered"}}]},
        {"models": [MODEL | {"name": "../x"}]},
        {"models": [MODEL | {"input_handling": "loose"}]},
        {"models": [MODEL | {"vision": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}]},
        {"models": [MODEL], "cache": {"redis": "http://somewhere"}},
        {"models": [MODEL], "cache": {"timeout_s": 0}},
        {"models": [MODEL], "router": {"torch_threads": 2}},
        {"models": [MODEL], "keys": [{"tenant": "a", "sha256": "short"}]},
    ],
)
def test_anything_else_is_refused(args):
    with pytest.raises(ValidationError):
        AppSettings.model_validate(args)


def test_the_context_is_what_checkpoint_setting_and_cache_allow():
    def context(**changes):
        return AppSettings.model_validate({"models": [MODEL | changes]}).models[0].context(4096)

    assert context() == 4096
    assert context(max_context=1000) == 1000
    assert context(decoder={"num_blocks": 8, "block_size": 16}) == 128


def test_settings_for_a_gpu_reach_the_engine_and_the_encoder():
    pools = {"decoder": {"attention": "paged", "cuda_graphs": False}, "vision": {"cuda_graphs": True}}
    (model,) = AppSettings.model_validate({"models": [MODEL | {"device": "cuda"} | pools]}).models
    engine = model.decoder.engine_config(4096)
    assert (engine.attention, engine.cuda_graphs) == ("paged", False)
    assert model.vision.encoder_config().cuda_graphs is True


def test_calls_wait_in_the_decoder_which_knows_tenants_and_not_in_front_of_it():
    pool = DecoderPool()
    assert pool.max_ongoing_requests > pool.max_sequences + pool.max_waiting * len(Priority)


@pytest.mark.parametrize(
    ("changes", "num_routers", "num_held"),
    [
        ({}, 1, 64 + 256),
        ({}, 2, 320),  # all may come through one of them
        ({}, 3, 214),
        ({}, 6, 128),  # never less than twice the seats
        ({"max_waiting": 1}, 1, 128),
        ({"max_ongoing_requests": 200}, 1, 200),
        ({"autoscaling": {"max_replicas": 3}}, 1, 3 * 320),
    ],
)
def test_a_router_counts_on_what_decoders_can_hold_and_leaves_no_seat_empty(changes, num_routers, num_held):
    assert DecoderPool.model_validate(changes).num_held(num_routers) == num_held


def test_a_redis_of_one_s_own_needs_a_secret(monkeypatch):
    monkeypatch.delenv(CACHE_SECRET_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=CACHE_SECRET_VARIABLE):
        cache_secret()
    monkeypatch.setenv(CACHE_SECRET_VARIABLE, "short")
    with pytest.raises(ConfigError):
        cache_secret()
    monkeypatch.setenv(CACHE_SECRET_VARIABLE, "x" * 32)
    assert cache_secret() == b"x" * 32


def test_the_settings_reach_the_library_s_configs():
    cache = Cache(redis="redis://h", timeout_s=0.02, ttl_s=5, lease_s=3, memory_bytes=7)
    config = cache.config("redis://h")
    assert (config.timeout_s, config.ttl_s, config.lease_s, config.memory_bytes) == (0.02, 5, 3, 7)
    args = {
        "models": [MODEL],
        "limits": {"max_images": 2},
        "keys": [{"tenant": "a", "sha256": "0" * 64, "models": ["m"]}],
    }
    settings = AppSettings.model_validate(args)
    assert settings.limits.config().max_images == 2
    assert not settings.key_book().is_open
