"""One worker's work on one batch, from wherever it stands to its end.

Whatever happened before, the same few steps are taken: read the lines, fix what earlier workers wrote, answer what is
not answered yet, write the files. A step that was done already finds nothing to do.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from sqlalchemy import Connection

from omnilmm.batch.desk import INPUT, BatchDesk
from omnilmm.batch.journal import Record, Segment, SegmentReader, read_segment, read_segments, segment_tokens
from omnilmm.batch.lines import Line, LineRules, read_body, scan
from omnilmm.batch.order import in_order
from omnilmm.batch.pace import Pace
from omnilmm.batch.results import answered, refused, unfinished, usage_of
from omnilmm.batch.states import BatchUsage, Counts, LineError, Status
from omnilmm.batch.store import Claim, IllegalStep, LeaseLost
from omnilmm.errors import OmniError, Overloaded
from omnilmm.files.blobs import StorageFull
from omnilmm.files.store import Purpose, StoredFile, Upload

MAX_ERRORS = 100
MAX_OUTPUT_BYTES = 64 * 1024**3
BREATHE_EVERY = 64
"""Lines of bookkeeping after which the event loop gets a turn."""

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


class Answerer(Protocol):
    """The service behind the HTTP surface, entered without HTTP."""

    def check_model(self, tenant: str, model: str) -> None:
        """Raises NotFound if the tenant cannot use the model, or is no tenant any more."""
        ...

    async def answer(
        self, endpoint: str, body: Mapping[str, Any], *, tenant: str, request_id: str, batch_id: str
    ) -> Mapping[str, Any]:
        """What POSTing this body to the endpoint would answer; runs behind whatever is online.

        Raises:
            OmniError: what it would be refused with.
        """
        ...


class Blocking(Protocol):
    """Makes a call that blocks: in place, or somewhere an event loop does not wait for it."""

    async def __call__(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...


async def in_place(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """For an event loop that has nothing else to do."""
    return call(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class WorkRules:
    """How a worker works. Times in seconds; a claim is lost `lease_s` after it was last renewed."""

    lease_s: float = 30.0
    renew_every_s: float = 5.0
    storage_retry_s: float = 5.0
    max_running: int = 64
    max_line_bytes: int = 32 * 1024**2
    max_lines: int = 50_000


class Job:
    """A claimed batch. `run` returns when it has ended, or its end is somebody else's business."""

    def __init__(
        self,
        desk: BatchDesk,
        claim: Claim,
        answerer: Answerer,
        rules: WorkRules,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        blocking: Blocking = in_place,
    ) -> None:
        self._desk, self._claim, self._answerer, self._rules = desk, claim, answerer, rules
        self._clock, self._sleep, self._blocking = clock, sleep, blocking
        self._batch = claim.batch
        self._folder: Path = desk.folders.path(claim.batch.id)
        self._records: dict[int, Record] = {}
        self._counts = claim.batch.counts
        self._segment: Segment | None = None
        self._stopped: asyncio.Future[Status] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Work until the batch has ended.

        Raises:
            LeaseLost: somebody else works on it now.
            Overloaded: the disk or the database has no room; the batch goes on later.
        """
        work = asyncio.ensure_future(self._work())
        heartbeat = asyncio.ensure_future(self._keep_claim())
        try:
            await asyncio.wait({work, heartbeat}, return_when=asyncio.FIRST_COMPLETED)
            (work if work.done() else heartbeat).result()
        finally:
            for task in (work, heartbeat):
                task.cancel()
            await asyncio.gather(work, heartbeat, return_exceptions=True)
            if self._segment is not None:
                self._segment.close()

    # -- the steps ------------------------------------------------------------------------------------

    async def _work(self) -> None:
        status = self._batch.status
        try:
            lines = await self._validate() if status is Status.VALIDATING else (await self._read_lines())[0]
        except IllegalStep:  # a wish to cancel came before anything had begun
            return await self._end(Status.CANCELLED)
        if not lines:
            return None
        if status is Status.CANCELLING and self._batch.in_progress_at is None:
            return await self._end(Status.CANCELLED)
        await self._blocking(self._recover)
        if status in (Status.VALIDATING, Status.IN_PROGRESS):
            status = await self._answer_all([line for line in lines if line.number not in self._records])
        ending = {Status.FINALIZING: Status.COMPLETED, Status.CANCELLING: Status.CANCELLED}.get(status, status)
        try:
            if status is Status.FINALIZING and self._batch.status is not Status.FINALIZING:
                await self._advance(Status.FINALIZING, counts=self._counts)
            await self._write_files(lines, ending)
        except IllegalStep:  # a wish to cancel came between
            await self._write_files(lines, Status.CANCELLED)
        return None

    async def _validate(self) -> list[Line]:
        """The lines of a batch that may begin, and has; none if it has ended instead."""
        if self._clock() >= self._batch.expires_at:
            await self._end(Status.EXPIRED)
            return []
        lines, errors = await self._read_lines()
        errors = errors or self._check_model(lines)
        if errors:
            await self._end(Status.FAILED, errors=tuple(errors))
            return []
        self._counts = Counts(total=len(lines))
        await self._advance(Status.IN_PROGRESS, counts=self._counts, model=lines[0].model)
        return lines

    async def _read_lines(self) -> tuple[list[Line], list[LineError]]:
        rules = LineRules(
            self._batch.endpoint, max_lines=self._rules.max_lines, max_line_bytes=self._rules.max_line_bytes
        )
        lines: list[Line] = []
        errors: list[LineError] = []
        with (self._folder / INPUT).open("rb") as file:
            for i, line in enumerate(scan(file, rules)):
                if isinstance(line, Line):
                    lines.append(line)
                else:
                    errors.append(line)
                if i % BREATHE_EVERY == 0:
                    await asyncio.sleep(0)
                if len(errors) >= MAX_ERRORS:
                    break
        return lines, errors

    def _check_model(self, lines: Sequence[Line]) -> list[LineError]:
        try:
            self._answerer.check_model(self._batch.tenant, lines[0].model)
        except OmniError as error:
            if error.status >= 500:
                raise
            return [LineError(error.code or "model_not_found", error.message, lines[0].number, "body.model")]
        return []

    def _recover(self) -> None:
        """Fix what earlier workers wrote, and take it over."""
        earlier = [token for token in segment_tokens(self._folder) if token < self._claim.token]
        lengths = {token: read_segment(self._folder, token)[1] for token in earlier}
        sealed = self._desk.batches.seal(self._claim, lengths)
        self._records = read_segments(self._folder, sealed)
        self._count()

    def _count(self) -> None:
        completed = sum(record.is_success for record in self._records.values())
        self._counts = Counts(self._counts.total, completed, len(self._records) - completed)

    # -- answering ------------------------------------------------------------------------------------

    async def _answer_all(self, lines: Sequence[Line]) -> Status:
        """Answer the lines; the state that follows: finalizing, or what stopped it."""
        self._segment = Segment(self._folder, self._claim.token)
        pace = Pace(max_running=self._rules.max_running, sleep=self._sleep)
        waiting = iter(in_order(lines))

        async def work() -> None:
            for line in waiting:
                await self._answer_one(line, pace)

        async def work_side_by_side() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._rules.max_running, len(lines))):
                    group.create_task(work())

        working = asyncio.ensure_future(work_side_by_side())
        try:
            either: set[asyncio.Future[Any]] = {working, self._stopped}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return Status.FINALIZING
            return self._stopped.result()
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _answer_one(self, line: Line, pace: Pace) -> None:
        request_id = secrets.token_hex(16)

        async def attempt() -> Mapping[str, Any]:
            with (self._folder / INPUT).open("rb") as file:
                body = read_body(file, line)
            try:
                return await self._answerer.answer(
                    self._batch.endpoint,
                    body,
                    tenant=self._batch.tenant,
                    request_id=request_id,
                    batch_id=self._batch.id,
                )
            except OmniError:
                raise
            except Exception as error:
                _log.exception("a line of a batch failed")
                raise OmniError("unforeseen") from error

        try:
            result = answered(line.custom_id, request_id, await pace.run(attempt, num_bytes=line.length))
            is_success = True
        except OmniError as error:
            result, is_success = refused(line.custom_id, request_id, error), False
        await self._record(line, result, is_success=is_success)

    async def _record(self, line: Line, result: bytes, *, is_success: bool) -> None:
        """Write a result down, however long the disk stays full: to answer again would cost more than to wait."""
        assert self._segment is not None
        while True:
            try:
                self._records[line.number] = self._segment.append(line.number, result, is_success=is_success)
            except StorageFull:
                await self._sleep(self._rules.storage_retry_s)
            else:
                break
        counts = self._counts
        self._counts = Counts(counts.total, counts.completed + is_success, counts.failed + (not is_success))

    async def _keep_claim(self) -> None:
        """Renew the claim until it is lost, and see whether the batch should stop."""
        renewed = self._clock()
        while True:
            await self._sleep(self._rules.renew_every_s)
            try:
                await self._blocking(self._sync)
                counts = self._counts if self._batch.in_progress_at is not None or self._segment else None
                status = await self._blocking(self._desk.batches.renew, self._claim, self._rules.lease_s, counts)
                renewed = self._clock()
            except Overloaded:
                if self._clock() - renewed >= self._rules.lease_s:
                    raise LeaseLost from None  # nobody could tell us whether it still is ours
                continue
            if self._stopped.done():
                continue
            if status is Status.CANCELLING:
                self._stopped.set_result(Status.CANCELLING)
            elif self._clock() >= self._batch.expires_at:
                self._stopped.set_result(Status.EXPIRED)

    def _sync(self) -> None:
        if self._segment is not None:
            with suppress(StorageFull):  # `_record` has met it too, and waits
                self._segment.sync()

    # -- ending ---------------------------------------------------------------------------------------

    async def _write_files(self, lines: Sequence[Line], status: Status) -> None:
        """Every line into one of the two files, in the order of the input; then the end of the batch."""
        files, tenant = self._desk.files, self._batch.tenant
        placed: list[StoredFile] = []
        with (
            files.upload(tenant, max_bytes=MAX_OUTPUT_BYTES) as output,
            files.upload(tenant, max_bytes=MAX_OUTPUT_BYTES) as errors,
        ):
            usage = await self._fill(output, errors, lines, status)
            for upload, suffix in ((output, "output"), (errors, "error")):
                if upload.num_bytes:
                    name = f"{self._batch.id}_{suffix}.jsonl"
                    after = self._batch.output_expires_after
                    stored = await self._blocking(
                        upload.place, purpose=Purpose.BATCH_OUTPUT, filename=name, expires_after=after
                    )
                    placed.append(stored)
        has_output = any(record.is_success for record in self._records.values())
        output_id = placed[0].id if has_output else None
        error_id = placed[-1].id if len(placed) > has_output else None
        completed = sum(record.is_success for record in self._records.values())
        try:
            await self._end(
                status,
                placed,
                usage=usage,
                counts=Counts(len(lines), completed, len(lines) - completed),
                output_file_id=output_id,
                error_file_id=error_id,
            )
        except (LeaseLost, IllegalStep):
            for stored in placed:
                files.discard(stored)
            raise

    async def _fill(self, output: Upload, errors: Upload, lines: Sequence[Line], status: Status) -> BatchUsage:
        total = BatchUsage()
        with SegmentReader(self._folder) as reader:
            for i, line in enumerate(lines):
                record = self._records.get(line.number)
                result = reader.read(record) if record is not None else unfinished(line.custom_id, status)
                (output if record is not None and record.is_success else errors).write(result + b"\n")
                if record is not None and record.is_success:
                    total += usage_of(result)
                if i % BREATHE_EVERY == 0:
                    await asyncio.sleep(0)
        return total

    async def _end(self, status: Status, placed: Sequence[StoredFile] = (), **changes: Any) -> None:
        def write(connection: Connection) -> None:
            for stored in placed:
                self._desk.files.insert(connection, stored)

        await self._advance(status, write=write, **changes)
        if self._segment is not None:
            self._segment.close()
        await self._blocking(self._desk.folders.remove, self._batch.id)

    async def _advance(self, status: Status, **changes: Any) -> None:
        await self._blocking(partial(self._desk.batches.advance, self._claim, status, **changes))
