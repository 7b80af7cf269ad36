"""What serve_config.yaml (and the command line) may say. Anything else is refused by name.

Every number has a unit in its description; every default is safe on one machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from omnilmm.api.files import MAX_UPLOAD_BYTES
from omnilmm.config import CacheConfig, EncoderConfig, EngineConfig, ImageLimits, InputHandling
from omnilmm.errors import ConfigError
from omnilmm.image.address import AllowList
from omnilmm.image.remote import RemotePolicy
from omnilmm.tenancy.keys import AdminKeys, KeyBook, KeyRecord, Tenant

CACHE_SECRET_VARIABLE = "OMNILMM_CACHE_SECRET"  # noqa: S105 - the name of a variable, not a secret
MIN_SECRET_CHARS = 32
DATABASE_VARIABLE = "OMNILMM_DATABASE"
SLOW_READER_VARIABLE = "OMNILMM_SLOW_READER_S"
MAX_STREAM_VARIABLE = "OMNILMM_MAX_STREAM_S"

VISION_RESOURCE = "vision_pool"
DECODE_RESOURCE = "decode_pool"


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Autoscaling(Settings):
    """How many replicas a pool has, and when that changes. Delays in seconds."""

    min_replicas: Annotated[int, Field(ge=0, le=500)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=500)] = 1
    initial_replicas: Annotated[int, Field(ge=0, le=500)] | None = None
    target_ongoing_requests: Annotated[float, Field(gt=0, le=10_000)] = 8.0
    look_back_period_s: Annotated[float, Field(gt=10, le=3600)] = 30.0
    upscale_delay_s: Annotated[float, Field(ge=0, le=3600)] = 5.0
    downscale_delay_s: Annotated[float, Field(ge=0, le=86_400)] = 120.0

    @model_validator(mode="after")
    def _in_order(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is greater than max_replicas")
        return self


class Pool(Settings):
    """The machine share of one replica, and what it may hold at a time."""

    autoscaling: Autoscaling = Autoscaling()
    num_cpus: Annotated[float, Field(ge=0, le=1024)] = 0.1
    num_gpus: Annotated[float, Field(ge=0, le=64)] = 0.0
    max_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] = 256
    max_queued_requests: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Calls that may wait in each caller for a free replica."""
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long a replica that is being retired may take to finish its streams, in seconds."""


class ModelPool(Pool):
    """A pool whose replicas hold weights."""

    pool_share: Annotated[float, Field(ge=0, le=64)] = 0.01
    """How much of the pool's custom resource one replica takes; 0 takes none, so any node will do."""
    torch_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads for matrix work; 0 means all cores of the machine."""


class VisionPool(ModelPool):
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 8
    max_queue: Annotated[int, Field(ge=1, le=100_000)] = 256
    cuda_graphs: bool | None = None
    """Replay batches of up to 16 pictures as CUDA graphs: on CUDA if not given, and true is refused elsewhere."""

    def encoder_config(self) -> EncoderConfig:
        return EncoderConfig(max_batch=self.max_batch, max_queue=self.max_queue, cuda_graphs=self.cuda_graphs)


class DecoderPool(ModelPool):
    max_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] = 1024
    """More than run and wait in the decoder: beyond this calls wait in Serve's line, where whoever came first goes
    first; the decoder's own line is fair to tenants, and refuses when it is full."""
    num_blocks: Annotated[int, Field(ge=8, le=10_000_000)] = 1024
    """KV blocks a replica keeps; times block_size it is the number of token positions."""
    block_size: Annotated[int, Field(ge=1, le=512)] = 16
    max_step_tokens: Annotated[int, Field(ge=16, le=1_000_000)] = 512
    batch_beside_online: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    """Tokens of batch jobs that a step may compute beside those of people who wait for their answers."""
    max_sequences: Annotated[int, Field(ge=1, le=100_000)] = 64
    max_waiting: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    weight_dtype: Literal["int8"] | None = None
    """Keep the language model's matrices as 8-bit integers (CPU only): faster for a few sequences at a time, slower
    for many, and a little less exact. The model's dtype if not given."""
    attention: Literal["auto", "gathered", "paged"] = "auto"
    """How keys are read: copied together (any device), or by block tables where they lie (CUDA, and a block_size that
    is a power of two from 16 on). auto is paged where it can be."""
    cuda_graphs: bool | None = None
    """Replay decode steps of up to 64 sequences as CUDA graphs: where attention is paged if not given, and true is
    refused elsewhere."""

    def num_held(self, num_routers: int) -> int:
        """A router's share of the requests that run and wait in all replicas there may be. Twice an even share, for
        requests do not spread evenly over routers. And at least twice as many as can run: by the rule of
        `omnilmm.tenancy.places` a tenant may be refused once two thirds are taken, which must not leave a seat empty.
        """
        held = min(self.max_sequences + self.max_waiting, self.max_ongoing_requests)
        share = min(held, -(-2 * held // num_routers))
        return self.autoscaling.max_replicas * max(2 * self.max_sequences, share)

    def engine_config(self, max_context: int) -> EngineConfig:
        return EngineConfig(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_step_tokens=self.max_step_tokens,
            batch_beside_online=self.batch_beside_online,
            max_sequences=self.max_sequences,
            max_waiting=self.max_waiting,
            max_context=max_context,
            attention=self.attention,
            cuda_graphs=self.cuda_graphs,
        )


AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class Adapters(Settings):
    """Low-rank adapters of a model, in peft's format; clients call them ``model:adapter``. See docs/adapters.md."""

    folder: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Every sub-folder is an adapter under its own name; a router looks once, when it starts."""
    paths: Annotated[dict[AdapterName, str], Field(max_length=10_000)] = {}
    """Adapters elsewhere: name to folder."""
    tenants: Annotated[dict[AdapterName, list[str]], Field(max_length=10_000)] = {}
    """Who may use an adapter; one that is not named here is everybody's."""
    max_loaded: Annotated[int, Field(ge=1, le=1024)] = 8
    """Adapters in a decoder replica's memory at a time; used or idle."""
    max_rank: Annotated[int, Field(ge=1, le=512)] = 64
    """The largest r. Memory for max_loaded adapters of this rank is taken at the start."""


class Model(Settings):
    """One served model: a checkpoint folder or hub id, under a name that clients use."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    input_handling: InputHandling = InputHandling.SAFE
    max_context: Annotated[int, Field(ge=128, le=1_000_000)] | None = None
    """Tokens of prompt and answer together; the checkpoint's own limit if not given."""
    vision: VisionPool = VisionPool()
    decoder: DecoderPool = DecoderPool()
    adapters: Adapters | None = None

    @model_validator(mode="after")
    def _weights_suit_device(self) -> Model:
        if self.decoder.weight_dtype is not None and self.device == "cuda":
            raise ValueError("decoder.weight_dtype int8 is made for CPU only")
        return self

    @model_validator(mode="after")
    def _cuda_settings_suit_device(self) -> Model:
        if self.device == "cpu" and self.decoder.attention == "paged":
            raise ValueError("decoder.attention paged is made for CUDA only")
        if self.device == "cpu" and (self.decoder.cuda_graphs or self.vision.cuda_graphs):
            raise ValueError("cuda_graphs are made for CUDA only")
        if self.decoder.cuda_graphs and self.decoder.attention == "gathered":
            raise ValueError("decoder.cuda_graphs needs attention paged")
        return self

    def context(self, checkpoint_limit: int) -> int:
        """Tokens of prompt and answer together: what the checkpoint, this setting and the KV cache allow."""
        room = self.decoder.num_blocks * self.decoder.block_size
        return min(checkpoint_limit, self.max_context or checkpoint_limit, room)


class RouterPool(Pool):
    max_ongoing_requests: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Requests in a router at a time; three quarters of them may be answers."""
    decode_workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Child processes per router replica that decode pictures."""
    request_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 300.0
    slow_reader_s: Annotated[float, Field(ge=1, le=3600)] = 30.0
    """How long a client may take to read 64 KiB that wait for it, before its connection is cut. One application's
    value holds for the whole cluster: `omnilmm serve` hands it to Serve's proxies when it starts."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=1024**3)] = 32 * 1024**2


class Cache(Settings):
    """The embedding cache. `redis` is "embedded" (a server of our own on a unix socket), "none", or a URL.

    Sentinels are named as redis+sentinel://host:port,host:port/service.
    """

    redis: Annotated[str, Field(max_length=1024)] = "embedded"
    redis_password_file: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Holds the password of that URL's server, and is read at every new connection: change it there at any time."""
    encoding: Literal["exact", "int8", "fp8"] = "exact"
    """How Redis keeps vectors; int8 and fp8 take half the room of bfloat16, and are checked on every picture."""
    embedded_max_bytes: Annotated[int, Field(ge=1024**2, le=2**44)] = 512 * 1024**2
    memory_bytes: Annotated[int, Field(ge=0, le=2**44)] = 256 * 1024**2
    """Vectors kept in each decoder replica's own memory."""
    timeout_s: Annotated[float, Field(gt=0, le=5)] = 0.05
    ttl_s: Annotated[float, Field(gt=0, le=10 * 365 * 86_400)] = 7 * 86_400.0
    lease_s: Annotated[float, Field(gt=0, le=600)] = 10.0

    @field_validator("redis")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        if value in ("embedded", "none") or re.match(r"^((redis|rediss)(\+sentinel)?|unix)://", value):
            return value
        raise ValueError('say "embedded", "none", or a redis://, rediss://, redis+sentinel:// or unix:// URL')

    @model_validator(mode="after")
    def _password_is_for_a_url(self) -> Cache:
        if self.redis_password_file is not None and self.redis in ("embedded", "none"):
            raise ValueError("redis_password_file goes with the URL of a Redis of your own")
        return self

    def config(self, url: str | None) -> CacheConfig:
        return CacheConfig(
            redis_url=url,
            memory_bytes=self.memory_bytes,
            timeout_s=self.timeout_s,
            ttl_s=self.ttl_s,
            lease_s=self.lease_s,
        )


class Key(Settings):
    """An API key by the SHA-256 of its text; `omnilmm keys new` makes one."""

    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
    models: list[str] | None = None
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0


class Limits(Settings):
    """Caps on pictures: bytes a file, pixels a side, an image and a request, images a request."""

    max_file_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 20 * 1024**2
    max_side: Annotated[int, Field(ge=64, le=65_535)] = 8192
    max_pixels: Annotated[int, Field(ge=4096, le=2**31)] = 36_000_000
    max_request_pixels: Annotated[int, Field(ge=4096, le=2**31)] = 64_000_000
    max_images: Annotated[int, Field(ge=1, le=256)] = 16

    def config(self) -> ImageLimits:
        return ImageLimits(**self.model_dump())


Host = Annotated[str, Field(min_length=1, max_length=300)]


class RemoteImages(Settings):
    """Pictures fetched from other servers. Off while no host is named (see omnilmm/image/address.py for the forms)."""

    hosts: Annotated[list[Host], Field(max_length=1024)] = []
    """Public hosts: a name, "*.name" for those below it, or "*" for all; with ":port" that port, else 80 and 443."""
    internal_hosts: Annotated[list[Host], Field(max_length=1024)] = []
    """Hosts that may have private addresses, each by its whole name or address."""
    allow_http: bool = False
    max_redirects: Annotated[int, Field(ge=0, le=10)] = 0
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 10.0
    """For a picture in all: waiting for a turn, looking the name up, redirects and every byte."""
    max_per_tenant: Annotated[int, Field(ge=1, le=1024)] = 4
    """Pictures of one tenant a router fetches at a time."""
    max_at_once: Annotated[int, Field(ge=1, le=4096)] = 64

    @model_validator(mode="after")
    def _hosts_are_hosts(self) -> RemoteImages:
        self._allow_list()
        return self

    def policy(self, limits: ImageLimits) -> RemotePolicy | None:
        """None while pictures are not fetched at all."""
        if not self.hosts and not self.internal_hosts:
            return None
        return RemotePolicy(
            self._allow_list(),
            allows_http=self.allow_http,
            max_redirects=self.max_redirects,
            timeout_s=self.timeout_s,
            max_bytes=limits.max_file_bytes,
            max_per_tenant=self.max_per_tenant,
            max_at_once=self.max_at_once,
        )

    def _allow_list(self) -> AllowList:
        return AllowList(tuple(self.hosts), tuple(self.internal_hosts))


class Admin(Settings):
    """Who may change tenants and read everybody's usage over HTTP, under /admin. Without keys: nobody."""

    keys: list[Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]] = []
    """SHA-256 of each admin key; `omnilmm keys new` makes one. With any, the server is closed to whoever has no key."""
    networks: list[str] = ["127.0.0.0/8", "::1/128"]
    """Addresses and networks they may come from."""

    @model_validator(mode="after")
    def _can_be_used(self) -> Admin:
        try:
            self.book()
        except ConfigError as error:
            raise ValueError(error.message) from None
        return self

    def book(self) -> AdminKeys:
        return AdminKeys(self.keys, networks=self.networks)


class Files(Settings):
    """Uploaded files and batches."""

    folder: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Where they lie; every router must see the same folder. If not given: beside a SQLite database, else in this
    user's state folder."""
    max_upload_bytes: Annotated[int, Field(ge=1024, le=2**34)] = MAX_UPLOAD_BYTES
    max_tenant_bytes: Annotated[int, Field(ge=1024, le=2**50)] = 20 * 1024**3


class AppSettings(Settings):
    """The whole application: `args` of serve_config.yaml."""

    models: Annotated[list[Model], Field(min_length=1, max_length=64)]
    router: RouterPool = RouterPool()
    cache: Cache = Cache()
    limits: Limits = Limits()
    remote_images: RemoteImages = RemoteImages()
    keys: list[Key] = []
    admin: Admin = Admin()
    files: Files = Files()
    database: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Where tenants, usage, files and batches are kept: sqlite:////path or postgresql://user:password@host/name.
    Routers on several machines need the second. If not given: $OMNILMM_DATABASE, else a file of this user."""

    @model_validator(mode="after")
    def _names_differ(self) -> AppSettings:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("two models have the same name")
        return self

    @property
    def database_url(self) -> str:
        return self.database or default_database()

    @property
    def files_folder(self) -> Path:
        if self.files.folder is not None:
            return Path(self.files.folder)
        database = self.database_url
        beside = database.startswith("sqlite:///")
        return (Path(database.removeprefix("sqlite:///")).parent if beside else _state_folder()) / "storage"

    def key_book(self) -> KeyBook:
        records = (
            KeyRecord(
                key.sha256,
                Tenant(
                    name=key.tenant,
                    scope=key.tenant,
                    models=None if key.models is None else frozenset(key.models),
                    weight=key.weight,
                ),
            )
            for key in self.keys
        )
        return KeyBook(records, is_managed=bool(self.admin.keys))


class ModelAppSettings(Settings):
    """One model as an application of its own: `args` of `deployments.app:build_model`. `cache` as the router's."""

    model: Model
    cache: Cache = Cache()


def default_database() -> str:
    """The database of a server that was told of none: what the environment says, else a file in this user's state."""
    return os.environ.get(DATABASE_VARIABLE) or f"sqlite:///{_state_folder() / 'omnilmm.db'}"


def _state_folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state").absolute() / "omnilmm"


def reader_limits() -> tuple[float, float]:
    """Seconds that Serve's proxies wait for a reader, and that a stream may take: they start before any application,
    so the environment tells them. If it does not: as `RouterPool` has it by default."""
    pool = RouterPool()
    patience_s = float(os.environ.get(SLOW_READER_VARIABLE, pool.slow_reader_s))
    return patience_s, float(os.environ.get(MAX_STREAM_VARIABLE, pool.request_timeout_s + patience_s))


def cache_secret() -> bytes:
    """The operator's secret that cache keys and MACs are made with; needed with a Redis of one's own.

    Raises:
        ConfigError: the variable is missing or too short.
    """
    secret = os.environ.get(CACHE_SECRET_VARIABLE, "")
    if len(secret) < MIN_SECRET_CHARS:
        raise ConfigError(
            f"set {CACHE_SECRET_VARIABLE} to at least {MIN_SECRET_CHARS} random characters, the same on every node: "
            "entries in a Redis of your own are keyed and authenticated with it"
        )
    return secret.encode()
