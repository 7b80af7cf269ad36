"""`omnilmm batch run`: many pictures and prompts through a model on this machine, without any server."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from omnilmm.batch.offline import Done, answer_rows, count_results, write_output
from omnilmm.batch.offline import Progress as Journal
from omnilmm.batch.sources import Asking, Row, fingerprint, is_openai, read_rows
from omnilmm.config import EngineConfig, ImageLimits, InputHandling
from omnilmm.errors import ConfigError, OmniError

if TYPE_CHECKING:
    from omnilmm.card import ModelCard
    from omnilmm.pipeline import Pipeline

batch = typer.Typer(help="Many requests at once.", no_args_is_help=True)

TENANT = "offline"
TABLE_MODEL = "model"
"""What rows of tables call the model; lines in OpenAI's shape have their own name for it."""
SAMPLED_PROMPTS = 100
QUEUE_RATIO = 1.5
"""Rows in work per place in the engine: with a few waiting, no place is ever empty."""


@batch.command("run")
def run(  # noqa: PLR0917  the parameters of a command are its options
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="JSONL, CSV, Parquet, or a folder of pictures.")],
    output: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file.", dir_okay=False)],
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; a tiny built-in one if none.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask of each row; {column} is the row's value.")] = None,
    system: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    image_column: Annotated[str, typer.Option(help="Column with a path, URL or bytes of a picture.")] = "image",
    id_column: Annotated[
        str | None, typer.Option(help="Column that names the rows; their number if not given.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Likeliest token each time.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampled answers, and --sample, repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Only so many rows, drawn at random.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and ask nothing.")] = False,
    price: Annotated[
        tuple[float, float] | None, typer.Option(help="For --dry-run: price of a million tokens read, and written.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Fetch pictures from https URLs of this host; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    input_handling: Annotated[InputHandling, typer.Option(help="safe or original.")] = InputHandling.SAFE,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Sequences decoded at a time.")] = 64,
    kv_blocks: Annotated[int, typer.Option(min=64, help="KV cache, in blocks of 16 tokens.")] = 2048,
) -> None:
    """Ask a model about every row of INPUT. Run it again to go on where it stopped."""
    console = Console(highlight=False, soft_wrap=True)
    if output.exists() and not dry_run:
        console.print(f"{output} is there already; remove it to run again")
        return
    if output.suffix.lower() not in (".jsonl", ".parquet") or (is_openai(source) and output.suffix == ".parquet"):
        raise ConfigError("the output is a .jsonl file, or for tables and folders a .parquet file")
    fields: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
    fields |= {} if seed is None else {"seed": seed}
    fields |= {"temperature": 0.0, "repetition_penalty": 1.0} if greedy else {}
    asking = Asking(TABLE_MODEL, prompt, system, image_column, id_column, fields)
    if is_openai(source) and (prompt is not None or system is not None or fields):
        raise ConfigError(
            "lines in OpenAI's shape say themselves what to ask: prompt and sampling options are for tables"
        )
    rows = _chosen(read_rows(source, asking), limit, sample, seed)
    path = model or _demo_model()
    if dry_run:
        _estimate(rows, path, dtype=dtype, handling=input_handling, price=price, console=console)
        return
    wanted = {"model": path, "asking": [prompt, system, image_column, id_column, fields], "rows": [limit, sample, seed]}
    journal = Journal(output, fingerprint(source, rows, wanted | {"dtype": dtype, "handling": input_handling}))
    engine = EngineConfig(num_blocks=kv_blocks, max_sequences=concurrency, max_waiting=4 * concurrency)
    try:
        tally = asyncio.run(
            _run(
                rows,
                journal,
                _Load(path, dtype, device, input_handling, engine, tuple(allow_host or ())),
                console,
            )
        )
    except BaseException:
        journal.close()
        console.print("stopped; run the same command again to go on")
        raise
    write_output(output, rows, journal, is_table=not is_openai(source))
    num_answered, num_failed = count_results(journal.records)
    journal.remove()
    console.print(f"wrote {output}: {num_answered} answered, {num_failed} failed; {tally.summary()}")


@dataclass(frozen=True, slots=True)
class _Load:
    """How the model is loaded, and from where pictures may be fetched."""

    path: str
    dtype: str
    device: str
    handling: InputHandling
    engine: EngineConfig
    hosts: tuple[str, ...]


@dataclass(slots=True)
class Tally:
    """What a run has done so far."""

    begun: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    pictures: int = 0
    encoded: int = 0
    failed: int = 0

    def add(self, done: Done) -> None:
        if done.body is None:
            self.failed += 1
            return
        usage = done.body["usage"]
        self.prompt_tokens += usage.get("prompt_tokens", 0)
        self.completion_tokens += usage.get("completion_tokens", 0)
        images = usage.get("images", [])
        self.pictures += len(images)
        self.encoded += sum(image["source"] == "encoded" for image in images)

    def summary(self) -> str:
        seconds = max(time.monotonic() - self.begun, 1e-9)
        return (
            f"{self.completion_tokens / seconds:.0f} tokens/s, "
            f"{self.pictures - self.encoded} of {self.pictures} pictures were there already, {self.failed} failures"
        )


async def _run(rows: Sequence[Row], journal: Journal, load: _Load, console: Console) -> Tally:
    from omnilmm.pipeline import Pipeline

    pipeline = Pipeline.load(
        load.path, dtype=load.dtype, device=load.device, input_handling=load.handling, engine=load.engine
    )
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    async with pipeline:
        service = LocalService.over(pipeline, _model_of(rows[0]), hosts=load.hosts)
        tally = Tally()
        try:
            with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
                task = bar.add_task("", total=len(rows), completed=len(journal.records), rate="")

                def tell(done: Done) -> None:
                    tally.add(done)
                    bar.update(task, advance=1, rate=tally.summary())

                max_running = int(load.engine.max_sequences * QUEUE_RATIO)
                await answer_rows(rows, service.ask, journal, max_running=max_running, tell=tell)
        finally:
            await service.aclose()
    return tally


class LocalService:
    """A pipeline as what `deployments.asking` asks: the same checks and answers as over HTTP, in this process."""

    def __init__(self, flows: dict[str, Any], images: Any) -> None:
        from deployments.asking import Ledger, LoggedReceipts
        from omnilmm.pipeline import SystemClock
        from omnilmm.tenancy.governor import Governor
        from omnilmm.tenancy.keys import Tenant

        self.flows, self.images = flows, images
        self.governor = Governor(SystemClock())
        self.ledger: Ledger = LoggedReceipts()
        self.request_timeout_s = 24 * 3600.0
        self._tenant = Tenant(TENANT, TENANT)

    @classmethod
    def over(cls, pipeline: Pipeline, name: str, *, hosts: Sequence[str] = ()) -> LocalService:
        from omnilmm.image.address import AllowList
        from omnilmm.image.reader import ImageReader
        from omnilmm.image.remote import RemoteFetcher, RemotePolicy

        try:
            remote = RemoteFetcher(RemotePolicy(AllowList(tuple(hosts)))) if hosts else None
        except ValueError:
            raise ConfigError("--allow-host takes a host's name, or *.name for all below it") from None
        return cls({name: pipeline.flow}, ImageReader(ImageLimits(), remote=remote))

    async def ask(self, endpoint: str, body: Mapping[str, Any], request_id: str) -> Mapping[str, Any]:
        """What the endpoint would answer to this body. Raises OmniError."""
        from deployments.asking import answer_document

        return await answer_document(self, endpoint, body, tenant=self._tenant, request_id=request_id)

    async def aclose(self) -> None:
        await self.images.aclose()


# -- before it runs -----------------------------------------------------------------------------------


def _chosen(rows: list[Row], limit: int | None, sample: int | None, seed: int | None) -> list[Row]:
    if limit is not None and sample is not None:
        raise ConfigError("--limit and --sample exclude each other")
    if sample is not None and sample < len(rows):
        drawn = random.Random(seed or 0).sample(rows, sample)  # noqa: S311 - nothing depends on nobody guessing it
        return sorted(drawn, key=lambda row: row.number)
    return rows[:limit]


def _model_of(row: Row) -> str:
    try:
        return str(row.body()["model"])
    except OmniError:
        return TABLE_MODEL


def _demo_model() -> str:
    from cluster.demo import demo_checkpoint

    return str(demo_checkpoint())


def _estimate(
    rows: Sequence[Row],
    path: str,
    *,
    dtype: str,
    handling: InputHandling,
    price: tuple[float, float] | None,
    console: Console,
) -> None:
    """Count what there is to do. Prompts are measured on a sample; answers are taken at their longest."""
    card = _read_card(path, dtype, handling)
    sampled = random.Random(0).sample(list(rows), min(len(rows), SAMPLED_PROMPTS))  # noqa: S311
    measured = [size for row in sampled if (size := _measure(card, row)) is not None]
    if not measured:
        raise ConfigError("not one of the sampled rows can be asked: look at a few with --limit")
    prompt_tokens, answer_tokens = (statistics.mean(sizes) * len(rows) for sizes in zip(*measured, strict=True))
    pictures = {row.place.picture for row in rows} - {b""}
    console.print(f"{len(rows)} rows, {len(pictures)} distinct pictures to encode")
    console.print(f"about {prompt_tokens:,.0f} tokens to read, at most {answer_tokens:,.0f} to write")
    if len(measured) < len(sampled):
        console.print(f"{len(sampled) - len(measured)} of {len(sampled)} sampled rows cannot be asked")
    if price is not None:
        cost = (prompt_tokens * price[0] + answer_tokens * price[1]) / 1e6
        console.print(f"at most {cost:,.2f} at {price[0]:g} and {price[1]:g} for a million tokens")


def _read_card(path: str, dtype: str, handling: InputHandling) -> ModelCard:
    from omnilmm.models.checkpoint import resolve_checkpoint
    from omnilmm.models.config import read_model_config
    from omnilmm.pipeline import read_card

    folder = resolve_checkpoint(path)
    config = read_model_config(folder)
    return read_card(
        TABLE_MODEL,
        folder,
        config,
        dtype=dtype,
        handling=handling,
        fingerprint="",
        max_context=config.max_context,
    )


def _measure(card: ModelCard, row: Row) -> tuple[int, int] | None:
    """Tokens of a row's prompts, and the most its answers can have; None if it cannot be asked."""
    from omnilmm.api.endpoints import ENDPOINTS
    from omnilmm.api.fields import Caller
    from omnilmm.composing import compose

    try:
        body = ENDPOINTS[row.endpoint](row.body())
        requests = body.to_requests(Caller("dry-run"), {param: b"" for _, param in body.pictures()})
        composed = [compose(card, request) for request in requests]
    except OmniError:
        return None
    longest = sum(sampling.max_tokens for _, sampling in composed)
    return sum(len(prompt.ids) for prompt, _ in composed), longest * body.num_choices
