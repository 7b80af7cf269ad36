"""`omnilmm batch run`: many pictures and prompts through a model without any server, here or on a cluster."""

from __future__ import annotations

import asyncio
import logging
import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.batch_scenes import draw, score
from cluster.batch_service import Load, LocalService, Tally
from omnilmm.batch.locations import locate
from omnilmm.batch.offline import Done, answer_rows, count_results, progress_folder, write_output
from omnilmm.batch.offline import Progress as Journal
from omnilmm.batch.sources import Asking, Row, fingerprint, is_openai, read_rows
from omnilmm.config import EngineConfig, InputHandling
from omnilmm.errors import ConfigError, OmniError

if TYPE_CHECKING:
    from collections.abc import Callable

    from omnilmm.card import ModelCard

batch = typer.Typer(help="Many requests at once.", no_args_is_help=True)
batch.command("draw")(draw)
batch.command("score")(score)

TABLE_MODEL = "model"
"""What rows of tables call the model; lines in OpenAI's shape have their own name for it."""
SAMPLED_PROMPTS = 100
QUEUE_RATIO = 1.5
"""Rows in work per place in the engine: with a few waiting, no place is ever empty."""


@batch.command("run")
def run(  # noqa: PLR0917  the parameters of a command are its options
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="JSONL, CSV, Parquet, or a folder of pictures; a path or a URL.")
    ],
    output: Annotated[str, typer.Argument(help="A .jsonl or .parquet file; a path or a URL.")],
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
    allow_store: Annotated[
        list[str] | None,
        typer.Option(help="Read pictures from URLs of this scheme, such as s3, besides the input's own; repeatable."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    input_handling: Annotated[InputHandling, typer.Option(help="safe or original.")] = InputHandling.SAFE,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Sequences decoded at a time.")] = 64,
    kv_blocks: Annotated[int, typer.Option(min=64, help="KV cache, in blocks of 16 tokens.")] = 2048,
    ray: Annotated[
        str | None, typer.Option(help='Run on a Ray cluster: its address, "auto", or "local" for one of our own.')
    ] = None,
    encoders: Annotated[int, typer.Option(min=1, help="With --ray: workers that encode pictures.")] = 1,
    decoders: Annotated[int, typer.Option(min=1, help="With --ray: workers that decode answers.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="With --ray: GPUs that each worker books.")] = 0.0,
) -> None:
    """Ask a model about every row of INPUT. Run it again to go on where it stopped."""
    console = Console(highlight=False, soft_wrap=True)
    read, write = locate(source), locate(output)
    if write.is_file() and not dry_run:
        console.print(f"{write} is there already; remove it to run again")
        return
    if ray is None and (encoders, decoders, gpus) != (1, 1, 0.0):
        raise ConfigError("--encoders, --decoders and --gpus are for --ray")
    if write.suffix not in (".jsonl", ".parquet") or (is_openai(read) and write.suffix == ".parquet"):
        raise ConfigError("the output is a .jsonl file, or for tables and folders a .parquet file")
    fields: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
    fields |= {} if seed is None else {"seed": seed}
    fields |= {"temperature": 0.0, "repetition_penalty": 1.0} if greedy else {}
    asking = Asking(TABLE_MODEL, prompt, system, image_column, id_column, fields, frozenset(allow_store or ()))
    if is_openai(read) and (prompt is not None or system is not None or fields):
        raise ConfigError(
            "lines in OpenAI's shape say themselves what to ask: prompt and sampling options are for tables"
        )
    rows = _chosen(read_rows(read, asking), limit, sample, seed)
    path = model or _demo_model()
    if dry_run:
        _estimate(rows, path, dtype=dtype, handling=input_handling, price=price, console=console)
        return
    wanted: dict[str, Any] = {"model": path, "rows": [limit, sample, seed]}
    wanted |= {"asking": [prompt, system, image_column, id_column, fields]}
    wanted |= {"dtype": dtype, "handling": input_handling, "output": str(write) if write.scheme else None}
    journal = Journal(progress_folder(write), fingerprint(read, rows, wanted))
    engine = EngineConfig(num_blocks=kv_blocks, max_sequences=concurrency, max_waiting=4 * concurrency)
    load = Load(path, _model_of(rows[0]), dtype, device, input_handling, engine, tuple(allow_host or ()))
    max_running = int(concurrency * QUEUE_RATIO)
    try:
        with _without_logs(), _bar(len(rows), len(journal.records)) as (tally, tell):
            if ray is None:
                asyncio.run(_run_here(rows, journal, load, max_running, tell))
            else:
                from cluster.batch_ray import Pools, answer_rows_on_ray

                pools = Pools(ray, encoders, decoders, gpus)
                answer_rows_on_ray(rows, load, journal, pools, max_running=max_running, tell=tell)
    except BaseException:
        journal.close()
        console.print("stopped; run the same command again to go on")
        raise
    write_output(write, rows, journal, is_table=not is_openai(read))
    num_answered, num_failed = count_results(journal.records)
    journal.remove()
    console.print(f"wrote {write}: {num_answered} answered, {num_failed} failed; {tally.summary()}")


async def _run_here(
    rows: Sequence[Row], journal: Journal, load: Load, max_running: int, tell: Callable[[Done], None]
) -> None:
    from omnilmm.pipeline import Pipeline

    pipeline = Pipeline.load(
        load.path, dtype=load.dtype, device=load.device, input_handling=load.handling, engine=load.engine
    )
    async with pipeline:
        service = LocalService.over(pipeline, load.name, hosts=load.hosts)
        try:
            await answer_rows(rows, service.ask, journal, max_running=max_running, tell=tell)
        finally:
            await service.aclose()


@contextmanager
def _without_logs() -> Iterator[None]:
    """A server notes every answer and every receipt; here they would run through the bar."""
    logger = logging.getLogger("ray.serve")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _bar(total: int, done_before: int) -> Iterator[tuple[Tally, Callable[[Done], None]]]:
    """A bar on stderr, and what it is told of each row."""
    tally = Tally()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task("", total=total, completed=done_before, rate="")

        def tell(done: Done) -> None:
            tally.add(done)
            bar.update(task, advance=1, rate=tally.summary())

        yield tally, tell


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
    from cluster.demo import builtin_checkpoint

    return str(builtin_checkpoint()[1])


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
