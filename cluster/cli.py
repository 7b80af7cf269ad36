"""The `omnilmm` command: serve, chat, keys, convert, and the training commands of `cluster.train`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cluster.adapters import adapters
from cluster.batch import batch
from cluster.config_file import settings_from_yaml, validated
from cluster.tenants import tenants, usage
from cluster.train import eval_nano, merge_adapter, train
from omnilmm.config import InputHandling
from omnilmm.errors import OmniError

if TYPE_CHECKING:
    from cluster.local import LocalCluster
    from deployments.settings import AppSettings

app = typer.Typer(
    help="OmniLMM on Ray Serve.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
keys = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")
app.add_typer(tenants, name="tenants")
app.add_typer(adapters, name="adapters")
app.add_typer(batch, name="batch")
app.command("usage")(usage)
app.command("train")(train)
app.command("eval-nano")(eval_nano)
app.command("merge-adapter")(merge_adapter)

PROCESS_ENVIRONMENT: Mapping[str, str] = {
    # Several processes share the cores. By default their OpenMP threads spin for long while they wait for each other,
    # which on a busy machine makes every one of them tens of times slower. Sleeping at once (OMP_WAIT_POLICY=PASSIVE)
    # makes a decode step on a quiet machine half as slow again. So they spin for about as long as what a step does
    # between two parallel loops takes, some 100 us. Read when torch is loaded.
    "GOMP_SPINCOUNT": "5000",
}
_BUILTIN: Mapping[str, str] = {
    "omnilmm-demo": "which has random weights: its answers mean nothing",
    "omnilmm-nano": "which was trained on drawn shapes and writing, and knows nothing else (docs/nano.md)",
}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Run the command; an error of ours is one line on stderr and exit status 1."""
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except OmniError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


@app.command()
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH of a checkpoint folder, hub id, nano:3b or nano:12b; repeatable. Without: nano:3b."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. Anything but loopback needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 8000,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    redis: Annotated[
        str, typer.Option(help='"embedded", "none", or a redis://, rediss:// or unix:// URL.')
    ] = "embedded",
    input_handling: Annotated[InputHandling, typer.Option(help="How faithful the edges are to the originals.")] = (
        InputHandling.SAFE
    ),
    config: Annotated[
        Path | None, typer.Option(help="A serve_config.yaml, instead of --model etc.", exists=True, dir_okay=False)
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the Prometheus page; any free one if not given.")
    ] = None,
    temp_dir: Annotated[
        Path | None, typer.Option(help="Keep Ray's logs here; a private folder, removed at the end, if not given.")
    ] = None,
) -> None:
    """Serve models on this machine until Ctrl-C."""
    from cluster.demo import demo_picture
    from cluster.local import LocalCluster

    begun = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - begun:6.1f} s[/]  {line}")

    is_demo = not model and config is None
    settings, hosted = (
        settings_from_yaml(config)
        if config is not None
        else (_settings(model or [_demo_model(say)], dtype=dtype, redis=redis, handling=input_handling), {})
    )
    cluster = LocalCluster(settings, hosted=hosted, host=host, port=port, temp_dir=temp_dir, metrics_port=metrics_port)
    changed = _catch_signals()
    try:
        cluster.start(say)
        _await_ready(cluster)
        say(f"[bold green]ready[/] at {cluster.url}")
        if not cluster.has_keys:
            _ask_once(cluster, settings, demo_picture(), console)
        _print_usage(cluster, settings, console, is_demo=is_demo)
        while changed.wait():
            changed.clear()
            _host_models_again(cluster, config, say)
    except KeyboardInterrupt:
        pass
    finally:
        _ignore_signals()
        say("stopping")
        cluster.stop()
        say("stopped")


@app.command()
def chat(
    picture: Annotated[Path, typer.Argument(help="A JPEG, PNG, WebP or GIF file.", exists=True, dir_okay=False)],
    question: Annotated[str, typer.Argument(help="The first question about it.")],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or hub id; with --url, the served model's name.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Ask a running cluster, e.g. http://127.0.0.1:8000.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OMNILMM_API_KEY", help="Key for the cluster.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (local).")] = "bfloat16",
    input_handling: Annotated[InputHandling, typer.Option(help="safe or original (local).")] = InputHandling.SAFE,
    greedy: Annotated[bool, typer.Option("--greedy", help="Likeliest token each time.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampled answers repeatable.")] = None,
) -> None:
    """Chat about a picture; further questions are read from the terminal until an empty line or Ctrl-D."""
    from omnilmm.chat import OmniLMMChat, img2base64

    console = Console(highlight=False)
    image = img2base64(picture)
    with _open_chat(OmniLMMChat, console, model, url, api_key, dtype, input_handling) as partner:
        messages = [{"role": "user", "content": question}]
        while True:
            pieces = []
            inputs = {"image": image, "question": json.dumps(messages)}
            for piece in partner.stream(inputs, greedy=greedy, max_tokens=max_tokens, seed=seed):
                pieces.append(piece)
                console.out(piece, end="", highlight=False)
            console.out("")
            try:
                question = console.input("[bold]> [/]") if sys.stdin.isatty() else sys.stdin.readline().strip()
            except (EOFError, KeyboardInterrupt):
                return
            if not question:
                return
            messages += [
                {"role": "assistant", "content": "".join(pieces).strip()},
                {"role": "user", "content": question},
            ]


@app.command()
def convert(
    gguf: Annotated[Path, typer.Argument(help="A GGUF file of a Llama-type text model.", exists=True, dir_okay=False)],
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes; must not hold files.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Turn a GGUF file into a checkpoint folder that can be served."""
    from cluster.convert import convert_gguf

    typer.echo(f"wrote {convert_gguf(gguf, folder, dtype=dtype)}")


@keys.command("new")
def keys_new(
    tenant: Annotated[str, typer.Option(help="Who the key is for.")] = "default",
) -> None:
    """Make an API key. It is shown once; the configuration gets its digest."""
    from omnilmm.tenancy.keys import new_key

    key, digest = new_key()
    typer.echo(
        f"key (shown once):  {key}\nunder `keys` in serve_config.yaml:\n  - {{tenant: {tenant}, sha256: {digest}}}"
    )


# -- settings -----------------------------------------------------------------------------------------


def _settings(models: list[str], *, dtype: str, redis: str, handling: InputHandling) -> AppSettings:
    described = []
    for entry in models:
        name, equals, path = entry.partition("=")
        if not equals or not name or not path:
            raise typer.BadParameter("--model takes NAME=PATH")
        described.append({"name": name, "path": path, "dtype": dtype, "input_handling": handling})
    from deployments.settings import AppSettings

    return validated(AppSettings, {"models": described, "cache": {"redis": redis}})


def _host_models_again(cluster: LocalCluster, config: Path | None, say: Any) -> None:
    """After SIGHUP: the models that are applications of their own, as the file now says. The rest needs a restart."""
    from omnilmm.errors import ConfigError

    try:
        if config is None:
            raise ConfigError("there is no --config to read again")
        settings, hosted = settings_from_yaml(config)
        if settings != cluster.settings:
            say("[yellow]only applications of deployments.app:build_model change without a restart[/]")
        cluster.host_models(hosted, say)
    except OmniError as error:
        say(f"[bold red]nothing more is changed:[/] {escape(error.message)}")
    else:
        say("models are as the file says")


def _demo_model(say: Any) -> str:
    from cluster.demo import builtin_checkpoint

    name, folder = builtin_checkpoint()
    say(f"no --model given: serving the built-in model [bold]{name}[/], {_BUILTIN[name]}")
    return f"{name}={folder}"


# -- running ------------------------------------------------------------------------------------------


def _catch_signals() -> Event:
    """The first Ctrl-C or SIGTERM interrupts whatever the main thread does, start-up included; a second one that
    comes in the same moment (a terminal's, and a supervisor's) does not interrupt the interruption.

    The event it returns is set by SIGHUP: the configuration has changed.
    """
    changed = Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        _ignore_signals()
        raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        signal.signal(number, interrupt)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda number, frame: changed.set())
    return changed


def _ignore_signals() -> None:
    """While stopping, a second Ctrl-C must not leave processes behind."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _await_ready(cluster: LocalCluster) -> None:
    import httpx

    from omnilmm.errors import StartupError

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{cluster.url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise StartupError("the server runs but does not become ready")


def _ask_once(cluster: LocalCluster, settings: AppSettings, picture: bytes, console: Console) -> None:
    """The main job, once, over HTTP: a picture and a question in, an answer out."""
    import base64

    from omnilmm.chat import OmniLMMChat

    question = "What is in the picture?"
    messages = json.dumps([{"role": "user", "content": question}])
    with OmniLMMChat(cluster.url, model=settings.models[0].name) as partner:
        answer = partner.process({"image": base64.b64encode(picture), "question": messages}, greedy=True, max_tokens=32)
    console.print(f"\n[bold]picture[/]   an orange circle and a blue square ({len(picture)} bytes of PNG)")
    console.print(f"[bold]question[/]  {question}")
    console.print(f"[bold]answer[/]    {answer}", markup=True)


def _print_usage(cluster: LocalCluster, settings: AppSettings, console: Console, *, is_demo: bool) -> None:
    import base64

    from cluster.demo import demo_picture

    url = "data:image/png;base64," + base64.b64encode(demo_picture()).decode("ascii")
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in the picture?"}]
    body = {
        "model": settings.models[0].name,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 32,
        "stream": True,
    }
    key = "-H 'Authorization: Bearer YOUR_KEY' " if cluster.has_keys else ""
    console.print("\nPaste this into another terminal:\n")
    curl = f"curl -sN {cluster.url}/v1/chat/completions"
    console.out(
        f"{curl} {key}-H 'Content-Type: application/json' -d '{json.dumps(body)}'",
        highlight=False,
    )
    if is_demo:
        told = f"This is the built-in model {settings.models[0].name}, {_BUILTIN[settings.models[0].name]}."
        console.print(f"\n[dim]{told} Serve a real model with --model NAME=PATH.[/]")
    console.print("\nCtrl-C stops everything.")


def _open_chat(
    kind: Any,
    console: Console,
    model: str | None,
    url: str | None,
    api_key: str | None,
    dtype: str,
    input_handling: InputHandling,
) -> Any:
    if url is not None:
        return kind(url, model=model, api_key=api_key)
    from cluster.demo import builtin_checkpoint

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        path = model or str(builtin_checkpoint()[1])
        return kind(path, dtype=dtype, input_handling=input_handling, progress=progress)


if __name__ == "__main__":
    main()
