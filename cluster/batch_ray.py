"""A batch on a Ray cluster: Ray Data moves rows through a pool of encoders and a pool of decoders.

Rows that ask about one picture stay together, so that one encoder sees it and one decoder answers about it. The results
come back to this process, which alone writes the journal: going on after a stop is the same as without Ray.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from cluster.batch_service import Load
from cluster.ray_session import check_room, connected, missing_packages
from omnilmm.batch.offline import Done, Progress
from omnilmm.batch.sources import Row
from omnilmm.errors import ConfigError, StartupError

if TYPE_CHECKING:
    import pyarrow

MAX_LINES = 16
"""Lines of a parcel. What a decoder has in hand when it dies is asked again, by the parcel."""


@dataclass(frozen=True, slots=True)
class Pools:
    """Where the stages run: the cluster's address as in `ray_session.connected`, and how many there are. Every encoder
    and decoder books one CPU and `gpus` GPUs."""

    address: str
    encoders: int = 1
    decoders: int = 1
    gpus: float = 0.0


def answer_rows_on_ray(
    rows: Sequence[Row],
    load: Load,
    progress: Progress,
    pools: Pools,
    *,
    max_running: int,
    tell: Callable[[Done], None],
) -> None:
    """Answer the rows that are not answered yet. Decoders have at most `max_running` in work, each of them.

    Raises:
        ConfigError: Ray Data is not installed, or there is no such cluster.
        StartupError: the cluster could not do it; what was answered is kept.
        StorageFull: the disk is full; what was answered is kept.
    """
    waiting = {row.number: row for row in progress.missing(rows)}
    if not waiting:
        return
    with _cluster(pools):
        from ray.exceptions import RayError

        try:
            for told in _results(waiting, load, pools, max_running):
                row, result = waiting[told["number"]], told["result"]
                progress.add(row, result, is_success=told["is_success"])
                tell(Done(row, result, json.loads(result)["response"]["body"] if told["is_success"] else None))
        except RayError as error:
            raise StartupError(f"the Ray cluster gave up: {str(error).strip().splitlines()[-1]}") from error
    if any(number not in progress.records for number in waiting):
        raise StartupError("the Ray cluster lost rows; run again to have them answered")


def bundles(rows: Sequence[Row]) -> list[list[int]]:
    """The numbers of the rows (in the order they should run) in heaps that one encoder takes at once: a picture's rows
    are never parted, others make heaps of MAX_LINES."""
    heaps: list[list[int]] = [[]]
    for picture, group in groupby(rows, key=lambda row: row.place.picture):
        numbers = [row.number for row in group]
        pieces = [numbers] if picture else [numbers[i : i + MAX_LINES] for i in range(0, len(numbers), MAX_LINES)]
        for piece in pieces:
            if heaps[-1] and len(heaps[-1]) + len(piece) > MAX_LINES:
                heaps.append([])
            heaps[-1] += piece
    return [heap for heap in heaps if heap]


def _results(rows: Mapping[int, Row], load: Load, pools: Pools, max_running: int) -> Iterator[dict[str, Any]]:
    from ray import data

    secret = secrets.token_bytes(32)
    heaps = bundles(list(rows.values()))
    books: dict[str, Any] = {"num_cpus": 1, "num_gpus": pools.gpus, "batch_format": "pyarrow", "zero_copy_batch": True}
    calls = -(-max_running // MAX_LINES) + 1
    answers = (
        data.from_items([{"rows": [rows[number] for number in heap]} for heap in heaps], override_num_blocks=len(heaps))
        .map_batches(
            _Encode,
            fn_constructor_args=(load, secret),
            batch_size=None,
            compute=_pool(pools.encoders, 4),
            **books,
        )
        .map_batches(
            _Decode,
            fn_constructor_args=(load, secret, max_running),
            batch_size=1,
            compute=_pool(pools.decoders, calls),
            **books,
        )
    )
    tables: Iterable[Any] = answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for table in tables:
        yield from table.to_pylist()


def _pool(size: int, calls: int) -> Any:
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=calls, max_concurrent_calls_per_actor=calls)


class _Encode:
    """A worker of the encode pool. Heaps of rows come as they are: Ray moves Python's own values between processes of
    one cluster by itself."""

    def __init__(self, load: Load, secret: bytes) -> None:
        from cluster.batch_stages import EncodeStage

        self._stage = EncodeStage(load, secret)

    async def __call__(self, heaps: pyarrow.Table) -> pyarrow.Table:
        import pyarrow

        parcels: list[Any] = []
        for rows in heaps.column("rows").to_pylist():
            parcels += await self._stage.pack(rows, max_lines=MAX_LINES)
        return pyarrow.Table.from_pylist(parcels, schema=parcel_schema())


class _Decode:
    """A worker of the decode pool."""

    def __init__(self, load: Load, secret: bytes, max_running: int) -> None:
        from cluster.batch_stages import DecodeStage

        self._stage = DecodeStage(load, secret, max_running=max_running)

    async def __call__(self, parcels: pyarrow.Table) -> pyarrow.Table:
        import pyarrow

        (parcel,) = parcels.to_pylist()
        return pyarrow.Table.from_pylist(await self._stage.answer(parcel), schema=result_schema())


def parcel_schema() -> pyarrow.Schema:
    """Of `batch_parcels.Parcel`."""
    import pyarrow as arrow

    line = {"number": arrow.int64(), "endpoint": arrow.string(), "custom_id": arrow.string()}
    line |= {"body": arrow.binary(), "refused": arrow.binary()}
    picture = {"file": arrow.binary(), "key": arrow.string(), "digest": arrow.binary()}
    picture |= {"width": arrow.int64(), "height": arrow.int64()}
    vector = {"key": arrow.string(), "dtype": arrow.string(), "rows": arrow.int64(), "columns": arrow.int64()}
    vector |= {"data": arrow.binary(), "seconds": arrow.float64(), "is_fresh": arrow.bool_()}
    members = {
        "lines": line,
        "files": {"name": arrow.string(), "data": arrow.binary()},
        "pictures": picture,
        "vectors": vector,
    }
    return arrow.schema([(name, arrow.list_(arrow.struct(list(told.items())))) for name, told in members.items()])


def result_schema() -> pyarrow.Schema:
    """Of what `batch_stages.DecodeStage.answer` gives."""
    import pyarrow as arrow

    return arrow.schema([("number", arrow.int64()), ("is_success", arrow.bool_()), ("result", arrow.binary())])


@contextmanager
def _cluster(pools: Pools) -> Iterator[None]:
    """Connected to the cluster, which has room for the pools."""
    if missing := missing_packages():
        raise ConfigError(f"Ray Data needs pip install 'omnilmm-serve[batch]' (no {', '.join(missing)})")
    num = pools.encoders + pools.decoders
    with connected(pools.address, num_cpus=num):
        _be_quiet()
        check_room({"CPU": num, "GPU": num * pools.gpus}, "the pools")
        yield


def _be_quiet() -> None:
    """Our own bar tells how far the run is."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
