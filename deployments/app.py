"""The application as a data flow: a router in front, and for each model a vision pool and a decoder pool.

The only file that decorates, configures and binds deployments; the classes themselves are plain.

    Router ──> Vision[model]     pictures to vectors, written to Redis
       └─────> Decoder[model]    prompts and keys to tokens; fetches vectors from Redis itself
"""

# No `from __future__ import annotations` here: Serve reads the real type of `args` to validate the file with it.

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from deployments.decoder import DRAIN_S, Decoder
from deployments.router import Router
from deployments.settings import DECODE_RESOURCE, VISION_RESOURCE, AppSettings, Autoscaling, ModelPool, Pool
from deployments.vision import Vision
from omnilmm.models.checkpoint import resolve_checkpoint
from omnilmm.models.config import read_model_config
from omnilmm.models.weights import encoder_fingerprint

AFFINITY = "deployments.affinity:AffinityRouter"
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 10.0


def build(args: AppSettings) -> Application:
    """The application that `args` describes: the one door from serve_config.yaml to running code.

    Reads each checkpoint's configuration and the bytes of its encoder (for the fingerprint that cache keys carry),
    but loads no weights: replicas do.
    """
    pools: dict[str, dict[str, Any]] = {}
    fingerprints: dict[str, str] = {}
    for model in args.models:
        folder = resolve_checkpoint(model.path)
        config = read_model_config(folder)
        decoder = _deployment(Decoder, f"decoder-{model.name}", model.decoder, _share(model.decoder, DECODE_RESOURCE))
        routing = RequestRouterConfig(request_router_class=AFFINITY)  # type: ignore[arg-type]  # Ray's hint is off
        pools[model.name] = {"decoder": decoder.options(request_router_config=routing).bind(model, args.cache)}
        fingerprints[model.name] = ""
        if config.vision is not None:
            vision = _deployment(Vision, f"vision-{model.name}", model.vision, _share(model.vision, VISION_RESOURCE))
            pools[model.name]["vision"] = vision.bind(model, args.cache)
            fingerprints[model.name] = encoder_fingerprint(folder, config)
    router = _deployment(serve.ingress()(Router), "router", args.router, {})
    return router.bind(args, fingerprints, pools)


def _share(pool: ModelPool, resource: str) -> dict[str, float]:
    return {resource: pool.pool_share} if pool.pool_share else {}


def _deployment(cls: type, name: str, pool: Pool, resources: dict[str, float]) -> serve.Deployment:
    return serve.deployment(
        name=name,
        ray_actor_options={
            "num_cpus": pool.num_cpus,
            "num_gpus": pool.num_gpus,
            "resources": resources,
        },
        autoscaling_config=_autoscaling(pool.autoscaling),
        max_ongoing_requests=pool.max_ongoing_requests,
        max_queued_requests=pool.max_queued_requests,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=DRAIN_S,
    )(cls)


def _autoscaling(wanted: Autoscaling) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=wanted.min_replicas,
        max_replicas=wanted.max_replicas,
        initial_replicas=wanted.initial_replicas,
        target_ongoing_requests=wanted.target_ongoing_requests,
        look_back_period_s=wanted.look_back_period_s,
        upscale_delay_s=wanted.upscale_delay_s,
        downscale_delay_s=wanted.downscale_delay_s,
    )
