"""What `omnilmm adapters` does: it works on a model's folder of adapters itself, whether a server runs or not.

A running server notices within a few seconds. Whoever can write to the folder is its operator; no key is asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.config_file import settings_from_yaml

if TYPE_CHECKING:
    from deployments.settings import Model

adapters = typer.Typer(help="LoRA adapters of a served model.", no_args_is_help=True)

Config = Annotated[
    Path, typer.Option(help="The serve_config.yaml that names the model and its folder.", exists=True, dir_okay=False)
]
ModelName = Annotated[str, typer.Argument(help="The model's name in the configuration.")]
AdapterName = Annotated[str, typer.Argument(help="What clients write behind the colon.")]


@adapters.command("add")
def add(
    model: ModelName,
    name: AdapterName,
    source: Annotated[Path, typer.Argument(help="A folder as peft writes it.", exists=True, file_okay=False)],
    config: Config,
    tenant: Annotated[
        list[str] | None, typer.Option(help="Who may use it; repeatable. Everybody if not given.")
    ] = None,
) -> None:
    """Check an adapter against the model, and put a copy of it beside it."""
    from deployments.adapters import open_adapter_folder
    from omnilmm.errors import ConfigError
    from omnilmm.models.adapter_files import CONFIG_FILE
    from omnilmm.models.adapter_header import WEIGHTS_FILE
    from omnilmm.models.checkpoint import resolve_checkpoint
    from omnilmm.models.config import read_model_config
    from omnilmm.tenancy.profile import check_name

    served = _model(config, model)
    if served.adapters is not None and name in served.adapters.paths:
        raise ConfigError("the configuration has an adapter of this name", param="name")
    tenants = None if not tenant else tuple(sorted({check_name(each, "tenant") for each in tenant}))
    folder = open_adapter_folder(served, read_model_config(resolve_checkpoint(served.path)))
    try:
        with folder.receive() as incoming, open(source / WEIGHTS_FILE, "rb") as weights:
            while piece := weights.read(1 << 20):
                incoming.write(piece)
            record = folder.put(incoming, name, (source / CONFIG_FILE).read_bytes(), tenants)
    except FileNotFoundError:
        raise ConfigError(f"an adapter is a {CONFIG_FILE} and a {WEIGHTS_FILE}") from None
    typer.echo(json.dumps({"id": f"{model}:{name}", "rank": record.rank, "bytes": record.num_bytes}))


@adapters.command("list")
def list_(config: Config, model: Annotated[str | None, typer.Option(help="Of this model only.")] = None) -> None:
    """All adapters that are there now."""
    from deployments.adapters import look

    table = Table("adapter", "tenants", "uploaded", "rank", "bytes")
    for served in _models(config):
        if served.adapters is None or model not in (None, served.name):
            continue
        for name, found in look(served.adapters).items():
            owners = "all" if found.owners is None else ", ".join(sorted(found.owners))
            record = found.record
            facts = ("no", "", "") if record is None else ("yes", str(record.rank), f"{record.num_bytes:,}")
            table.add_row(f"{served.name}:{name}", owners, *facts)
    Console(highlight=False).print(table)


@adapters.command("remove")
def remove(model: ModelName, name: AdapterName, config: Config) -> None:
    """Take an uploaded adapter away. Answers under way end as they began."""
    from deployments.adapters import open_adapter_folder
    from omnilmm.models.checkpoint import resolve_checkpoint
    from omnilmm.models.config import read_model_config

    served = _model(config, model)
    open_adapter_folder(served, read_model_config(resolve_checkpoint(served.path))).remove(name)
    typer.echo(f"{model}:{name} is gone")


def _model(config: Path, name: str) -> Model:
    for model in _models(config):
        if model.name == name:
            return model
    raise typer.BadParameter(f"{config} names no model {name}")


def _models(config: Path) -> list[Model]:
    router, hosted = settings_from_yaml(config)
    return [*router.models, *(app.model for app in hosted.values())]
