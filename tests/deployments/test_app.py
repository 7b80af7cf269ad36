"""The door from serve_config.yaml to running code."""

from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from deployments.app import build, build_model
from deployments.hosting import MODEL_DEPLOYMENT


def test_arguments_from_a_file_are_typed_and_make_an_application(data):
    """Serve hands over a plain dict; its own builder call must turn it into our settings."""
    models = [
        {"name": name, "path": str(data / name), "dtype": "float32"} for name in ("omnilmm-12b-tiny", "minicpm-v-tiny")
    ]
    application = call_user_app_builder_with_args_if_necessary(build, {"models": models, "cache": {"redis": "none"}})
    router = application._bound_deployment
    settings, fingerprints, pools = router.init_args
    assert router.name == "router"
    assert router._deployment_config.backpressure_config.retry_after_s == 1  # also where Serve refuses by itself
    assert settings.models[0].name == "omnilmm-12b-tiny"
    assert set(pools) == {"omnilmm-12b-tiny", "minicpm-v-tiny"}
    assert all(set(pool) == {"vision", "decoder"} for pool in pools.values())
    assert len(set(fingerprints.values())) == 2


def test_each_pool_books_its_own_resource(data):
    vision = {"num_gpus": 0.5, "pool_share": 1, "autoscaling": {"min_replicas": 0, "max_replicas": 3}}
    models = [{"name": "m", "path": str(data / "minicpm-v-tiny"), "vision": vision}]
    application = call_user_app_builder_with_args_if_necessary(build, {"models": models})
    _, _, pools = application._bound_deployment.init_args
    eyes, tongue = (pools["m"][pool]._bound_deployment for pool in ("vision", "decoder"))
    assert eyes.ray_actor_options["resources"] == {"vision_pool": 1}
    assert eyes.ray_actor_options["num_gpus"] == 0.5
    assert "decode_pool" in tongue.ray_actor_options["resources"]
    assert eyes._deployment_config.autoscaling_config.max_replicas == 3
    assert eyes._deployment_config.autoscaling_config.min_replicas == 0


def test_a_model_can_be_an_application_of_its_own(data):
    args = {"model": {"name": "m", "path": str(data / "minicpm-v-tiny")}, "cache": {"redis": "none"}}
    application = call_user_app_builder_with_args_if_necessary(build_model, args)
    entrance = application._bound_deployment
    model, fingerprint, pools = entrance.init_args
    assert entrance.name == MODEL_DEPLOYMENT
    assert model.name == "m"
    assert len(fingerprint) >= 32
    assert {pool._bound_deployment.name for pool in pools.values()} == {"vision-m", "decoder-m"}
