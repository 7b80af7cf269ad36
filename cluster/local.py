"""Ray, Serve and the application on this one machine: started together, stopped together, nothing left behind."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnilmm.errors import ConfigError, StartupError
from omnilmm.tenancy.keys import is_loopback

if TYPE_CHECKING:
    from deployments.settings import AppSettings, Model, ModelAppSettings

APP_NAME = "omnilmm"
READY_TIMEOUT_S = 600.0
DRAIN_S = 30.0
LOGICAL_POOL = 1000.0
"""How much of each pool's resource this machine claims to have: replicas here share it whatever they book."""
OBJECT_STORE_BYTES = 200 * 1024**2

Say = Callable[[str], None]

RAY_ENVIRONMENT: Mapping[str, str] = {
    # read by every Ray process at its start, so they must be set before ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # Ray's own ports answer nobody without this machine's token
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # about half the cost per hop of the object store
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 1024**2),  # a request body can be 32 MB
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.slow_readers:proxy_middleware",
    "RAY_DEDUP_LOGS": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.4",  # at 0.1 the controller alone takes 4 % of a core at rest
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what Ray does there suits us: it listens on loopback only
}


class LocalCluster:
    """A whole cluster on this machine.

    Args:
        settings: the router's application, with the models that belong to it.
        hosted: models that are applications of their own, by the application's name.
        host: address to listen on; anything but loopback needs API keys in the settings.
        port: TCP port for HTTP.
        temp_dir: where Ray keeps sockets and logs; a private folder that is removed again if not given.
        metrics_port: port of the Prometheus page on loopback, or None for one Ray picks.
    """

    def __init__(
        self,
        settings: AppSettings,
        *,
        hosted: Mapping[str, ModelAppSettings] | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        temp_dir: Path | None = None,
        metrics_port: int | None = None,
    ) -> None:
        self.settings, self.host, self.port = settings, host, port
        self.hosted = dict(hosted or {})
        self.metrics_port = metrics_port
        self._given_dir = temp_dir
        self.temp_dir: Path | None = None
        self._started = False
        self.has_keys = True

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self, say: Say) -> None:
        """Bring everything up; returns when the application answers. `say` gets a line for each thing done.

        Raises:
            ConfigError: the address is taken, or open to the network without keys.
            CheckpointError: a model's files cannot be used.
            StartupError: a deployment could not start; the message is what it said.
        """
        self.has_keys = _has_keys(self.settings)
        check_address(self.host, self.port, has_keys=self.has_keys)
        for name, value in RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.update(proxy_environment(self.settings))
        self._read_models()
        self.temp_dir = self._given_dir or Path(tempfile.mkdtemp(prefix="omnilmm-", dir=_short_temp()))
        os.environ["RAY_TMPDIR"] = str(self.temp_dir)
        self._started = True
        self._start_ray(say)
        self._start_serve(say)

    def host_models(self, wanted: Mapping[str, ModelAppSettings], say: Say) -> None:
        """Make the hosted applications those `wanted`: start, change and end what differs, and touch nothing else.

        A change is rolling: old replicas serve until new ones do.
        """
        from ray import serve

        from deployments.app import build_model

        for name in self.hosted.keys() - wanted.keys():
            serve.delete(name)
            say(f"{name}: ended")
        for name, args in wanted.items():
            if self.hosted.get(name) != args:
                serve.run_many(
                    [serve.RunTarget(build_model(args), name=name, route_prefix=None, logging_config=_json_logs())],
                    wait_for_applications_running=False,
                )
                self._await_running(name, say)
        self.hosted = dict(wanted)

    def stop(self) -> None:
        """End what `start` began, in reverse; safe to call at any point of it, and twice.

        Answers under way have half a minute to come to their end; new ones are refused meanwhile.
        """
        if not self._started:
            return
        import ray
        from ray import serve

        if ray.is_initialized():
            # Ray announces the planned end of its own controller as a failure, from a thread of its own
            silence = io.StringIO()
            with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
                with contextlib.suppress(Exception):  # going down must go on, whatever has died before us
                    drained = serve.get_app_handle(APP_NAME).broadcast("drain", DRAIN_S)
                    drained.results(timeout_s=DRAIN_S + 5)
                with contextlib.suppress(Exception):
                    serve.shutdown()
                with contextlib.suppress(Exception):
                    self._stop_redis()
                ray.shutdown()
        if self._given_dir is None and self.temp_dir is not None:
            shutil.rmtree(self.temp_dir, ignore_errors=True)
        self._started = False

    def _read_models(self) -> None:
        """Find out in a second what a replica would find out in a minute: that a checkpoint cannot be read."""
        from omnilmm.models.checkpoint import resolve_checkpoint
        from omnilmm.models.config import read_model_config

        for model in self._all_models():
            read_model_config(resolve_checkpoint(model.path))

    def _all_models(self) -> list[Model]:
        return [*self.settings.models, *(hosted.model for hosted in self.hosted.values())]

    def _start_ray(self, say: Say) -> None:
        begun = time.monotonic()
        import ray

        num_pools = 2 * len(self._all_models())
        with _sigterm_kept():
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, 4) + num_pools,  # logical: booked by replicas, not burnt
                resources={"vision_pool": LOGICAL_POOL, "decode_pool": LOGICAL_POOL},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(self.temp_dir),
                _metrics_export_port=self.metrics_port,
            )
        address = ray.get_runtime_context().gcs_address
        logs = f"{self.temp_dir}/session_latest/logs/serve"
        say(f"Ray is up at {address} ({time.monotonic() - begun:.1f} s); logs: {logs}")

    def _start_serve(self, say: Say) -> None:
        begun = time.monotonic()
        from ray import serve

        from deployments.app import build

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options={"host": self.host, "port": self.port}, logging_config=_json_logs())
        app = build(self.settings)
        say(f"Serve is up, checkpoints are read ({time.monotonic() - begun:.1f} s); starting replicas")
        target = serve.RunTarget(app, name=APP_NAME, route_prefix="/", logging_config=_json_logs())
        serve.run_many([target], wait_for_applications_running=False)
        self._await_running(APP_NAME, say)
        wanted, self.hosted = self.hosted, {}
        self.host_models(wanted, say)
        say(f"All pools are running ({time.monotonic() - begun:.1f} s)")

    def _await_running(self, name: str, say: Say) -> None:
        from ray import serve

        deadline = time.monotonic() + READY_TIMEOUT_S
        seen: dict[str, str] = {}
        while time.monotonic() < deadline:
            app = serve.status().applications[name]
            for part, deployment in app.deployments.items():
                if deployment.status != seen.get(part):
                    seen[part] = deployment.status
                    say(f"  {part}: {deployment.status.value.lower().replace('_', ' ')}")
                if "DEPLOY_FAILED" in deployment.status or "UNHEALTHY" in deployment.status:
                    raise StartupError(f"{part} could not start: {_last_line(deployment.message)}")
            if app.status == "RUNNING":
                return
            if app.status == "DEPLOY_FAILED":
                raise StartupError(f"the application {name} could not start: {_last_line(app.message)}")
            time.sleep(0.2)
        raise StartupError(f"the application {name} was not running after {READY_TIMEOUT_S:.0f} s")

    def _stop_redis(self) -> None:
        import ray

        from deployments.stores import ACTOR_NAME, NAMESPACE

        actor: Any = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
        ray.wait([actor.stop.remote()], timeout=3)
        ray.kill(actor)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM in the place of ours, which ends its processes before we have stopped."""
    ours = signal.getsignal(signal.SIGTERM)
    yield
    with contextlib.suppress(ValueError):  # not on the main thread: Ray has changed nothing
        signal.signal(signal.SIGTERM, ours)


def proxy_environment(settings: AppSettings) -> Mapping[str, str]:
    """What Serve's proxies cannot read in the application's settings: they start before it."""
    from deployments.settings import MAX_STREAM_VARIABLE, SLOW_READER_VARIABLE

    patience_s, answer_s = settings.router.slow_reader_s, settings.router.request_timeout_s
    return {SLOW_READER_VARIABLE: str(patience_s), MAX_STREAM_VARIABLE: str(answer_s + patience_s)}


def _has_keys(settings: AppSettings) -> bool:
    """Whether requests need a key: one of the configuration, an admin's, or one that was ever made for a tenant."""
    from omnilmm.database import Database
    from omnilmm.tenancy.directory import Directory

    database = Database(settings.database_url)
    try:
        return bool(settings.keys or settings.admin.keys) or Directory(database).roster().had_keys
    finally:
        database.close()


def check_address(host: str, port: int, *, has_keys: bool) -> None:
    """Raises ConfigError for an address that is taken, or that is open to the network without keys."""
    if not has_keys and not is_loopback(host):
        raise ConfigError(
            f"refusing to listen on {host} without API keys; make one with `omnilmm keys new` and put its digest "
            "under `keys`, or listen on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from None


def _json_logs() -> dict[str, Any]:
    return {"encoding": "JSON", "enable_access_log": False}


def _short_temp() -> str:
    """A place for unix sockets, whose paths may not exceed 107 bytes."""
    default = tempfile.gettempdir()
    return default if len(default) <= 40 else "/tmp"  # noqa: S108 - mkdtemp makes a private folder in it


def _last_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
