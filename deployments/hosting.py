"""Models that come and go while the router runs: each an application of its own, found by asking Serve.

Serve restarts every deployment of an application whose arguments change, so a model inside the router's application
cannot be added without restarting the others. As an application of its own it starts, changes and ends alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from deployments.database import blocking
from deployments.settings import Model

MODEL_DEPLOYMENT: Final = "model"
DESCRIBE_TIMEOUT_S: Final = 10.0

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Hosted:
    """A model another application serves. `has_vision` says whether it has a vision pool."""

    app: str
    model: Model
    fingerprint: str
    has_vision: bool

    def pools(self) -> dict[str, DeploymentHandle]:
        """Fresh handles of its pools, by "decoder" and "vision"."""
        kinds = ("decoder", "vision") if self.has_vision else ("decoder",)
        return {kind: serve.get_deployment_handle(f"{kind}-{self.model.name}", app_name=self.app) for kind in kinds}


class HostedModel:
    """The entrance of a model's application: it owns the pools and says what they serve."""

    def __init__(self, model: Model, fingerprint: str, pools: dict[str, DeploymentHandle]) -> None:
        self._model, self._fingerprint, self._pools = model, fingerprint, pools

    def describe(self) -> tuple[Model, str, bool]:
        """The model's settings, the fingerprint of its encoder's weights, and whether it has a vision pool."""
        return self._model, self._fingerprint, "vision" in self._pools


async def find_hosted(known: Mapping[str, Hosted]) -> dict[str, Hosted]:
    """Every model that serves as an application of its own, by the application's name.

    One that is starting is left out. One of the `known` that changes, or does not answer just now, stays as it was:
    its old replicas serve until the new ones do.
    """
    status = await blocking(serve.status)
    apps = {name: app.status for name, app in status.applications.items() if MODEL_DEPLOYMENT in app.deployments}
    running = [name for name, state in apps.items() if state == ApplicationStatus.RUNNING]
    described = await asyncio.gather(*map(_describe, running))
    found = {hosted.app: hosted for hosted in described if hosted is not None}
    kept = {name: known[name] for name, state in apps.items() if state != ApplicationStatus.DELETING and name in known}
    return kept | found


async def _describe(app: str) -> Hosted | None:
    handle = serve.get_deployment_handle(MODEL_DEPLOYMENT, app_name=app)
    try:
        async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
            model, fingerprint, has_vision = await handle.describe.remote()
    except Exception:  # whatever ails another application, the router goes on, and asks again at the next round
        logger.warning("the application %s does not say which model it serves", app, exc_info=True)
        return None
    return Hosted(app, model, fingerprint, has_vision)
