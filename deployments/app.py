"""The application as a data flow: a router in front, and for each model a vision pool and a decoder pool.

The only file that decorates, configures and binds deployments; the classes themselves are plain.

    Router ──> Vision[model]     pictures to vectors, written to Redis
       └─────> Decoder[model]    prompts and keys to tokens; fetches vectors from Redis itself

Serve restarts every deployment of an application whose `args` change. A model that shall come and go without the
others noticing is therefore an application of its own (`build_model`), which the router finds by itself.
"""

# No `from __future__ import annotations` here: Serve reads the real type of `args` to validate the file with it.

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig

from deployments.decoder import Decoder
from deployments.hosting import MODEL_DEPLOYMENT, HostedModel
from deployments.router import Router
from deployments.settings import (
    DECODE_RESOURCE,
    VISION_RESOURCE,
    AppSettings,
    Autoscaling,
    Cache,
    Model,
    ModelAppSettings,
    ModelPool,
    Pool,
)
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
    pools: dict[str, dict[str, Application]] = {}
    fingerprints: dict[str, str] = {}
    for model in args.models:
        pools[model.name], fingerprints[model.name] = _pools(model, args.cache)
    router = _deployment(serve.ingress()(Router), "router", args.router, {})
    return router.bind(args, fingerprints, pools)


def build_model(args: ModelAppSettings) -> Application:
    """One model as an application without a route; the router of the same cluster takes it up while it runs."""
    pools, fingerprint = _pools(args.model, args.cache)
    return _deployment(HostedModel, MODEL_DEPLOYMENT, Pool(num_cpus=0), {}).bind(args.model, fingerprint, pools)


def _pools(model: Model, cache: Cache) -> tuple[dict[str, Application], str]:
    """A model's pools, "decoder" and (if it sees) "vision", and the fingerprint of its encoder's weights."""
    folder = resolve_checkpoint(model.path)
    config = read_model_config(folder)
    decoder = _deployment(Decoder, f"decoder-{model.name}", model.decoder, _share(model.decoder, DECODE_RESOURCE))
    room = {} if model.adapters is None else {"max_loaded": model.adapters.max_loaded}
    routing = RequestRouterConfig(
        request_router_class=AFFINITY,  # type: ignore[arg-type]  # Ray's hint is off
        request_router_kwargs=room,
    )
    pools = {"decoder": decoder.options(request_router_config=routing).bind(model, cache)}
    if config.vision is None:
        return pools, ""
    vision = _deployment(Vision, f"vision-{model.name}", model.vision, _share(model.vision, VISION_RESOURCE))
    return pools | {"vision": vision.bind(model, cache)}, encoder_fingerprint(folder, config)


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
        backpressure_config=BackpressureConfig(retry_after_s=1),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=pool.drain_s,
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
