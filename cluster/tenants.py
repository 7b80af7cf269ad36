"""What `omnilmm tenants` and `omnilmm usage` do: they work on the database itself, whether a server runs or not.

A running server notices within a few seconds. Whoever can write the database's file is its operator; no key is asked.
"""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from omnilmm.database import Database
    from omnilmm.tenancy.directory import Directory, KeyInfo, NewKey

tenants = typer.Typer(help="Tenants, their keys and limits.", no_args_is_help=True)

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database", envvar="OMNILMM_DATABASE", help="sqlite:////path or postgresql://user:password@host/name"
    ),
]
TenantName = Annotated[str, typer.Argument(help="The tenant's name.")]
Share = Annotated[
    str | None, typer.Option(help="Tenants of one share find each other's pictures in the cache; or none.")
]
Weight = Annotated[float | None, typer.Option(help="Share of the machine when tenants compete.")]
PriorityClass = Annotated[str | None, typer.Option("--priority", help="online or batch.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="MODEL, MODEL:ADAPTER, MODEL:*; repeatable. Or: all.")
]
Limit = str | None
RequestsPerMin = Annotated[Limit, typer.Option(help="A number, or none for no limit.")]
TokensPerMin = Annotated[Limit, typer.Option(help="Prompt and answer together; or none.")]
PixelsPerMin = Annotated[Limit, typer.Option("--image-pixels-per-min", help="Of the pictures sent; or none.")]
Concurrent = Annotated[Limit, typer.Option("--concurrent-requests", help="At the same time; or none.")]
CacheBytes = Annotated[Limit, typer.Option(help="Bytes of picture vectors in the cache; or none.")]
LastsDays = Annotated[float | None, typer.Option(min=0.01, help="Days until the key expires; never if not given.")]

DAY_S = 86_400.0


@tenants.command("add")
def add(  # noqa: PLR0917  the parameters of a command are its options
    name: TenantName,
    share: Share = None,
    weight: Weight = None,
    priority: PriorityClass = None,
    model: Models = None,
    requests_per_min: RequestsPerMin = None,
    tokens_per_min: TokensPerMin = None,
    image_pixels_per_min: PixelsPerMin = None,
    concurrent_requests: Concurrent = None,
    cache_bytes: CacheBytes = None,
    lasts_days: LastsDays = None,
    database: DatabaseUrl = None,
) -> None:
    """Add a tenant and make its first key, which is shown once."""
    limits = (requests_per_min, tokens_per_min, image_pixels_per_min, concurrent_requests, cache_bytes)
    changes = _changes(share, weight, priority, model, limits)
    with _Records(database) as records:
        records.directory.add(name, changes)
        _show_key(records.directory.add_key(name, lasts_s=_seconds(lasts_days)))


@tenants.command("set")
def set_(  # noqa: PLR0917  the parameters of a command are its options
    name: TenantName,
    share: Share = None,
    weight: Weight = None,
    priority: PriorityClass = None,
    model: Models = None,
    requests_per_min: RequestsPerMin = None,
    tokens_per_min: TokensPerMin = None,
    image_pixels_per_min: PixelsPerMin = None,
    concurrent_requests: Concurrent = None,
    cache_bytes: CacheBytes = None,
    database: DatabaseUrl = None,
) -> None:
    """Change a tenant. What is not named stays as it is."""
    limits = (requests_per_min, tokens_per_min, image_pixels_per_min, concurrent_requests, cache_bytes)
    changes = _changes(share, weight, priority, model, limits)
    if not changes:
        raise typer.BadParameter("say what to change")
    with _Records(database) as records:
        typer.echo(json.dumps(records.directory.change(name, changes).document(), indent=2))


@tenants.command("list")
def list_(database: DatabaseUrl = None) -> None:
    """All tenants."""
    table = Table("tenant", "status", "weight", "priority", "models", "limits")
    with _Records(database) as records:
        for profile, is_live in records.directory.tenants():
            document = profile.document()
            limits = [f"{n}={document[n]}" for n in _LIMITS if document[n] is not None]
            models = "all" if profile.models is None else ", ".join(profile.models)
            status = "live" if is_live else "revoked"
            table.add_row(profile.name, status, f"{profile.weight:g}", document["priority"], models, ", ".join(limits))
    Console(highlight=False).print(table)


@tenants.command("show")
def show(name: TenantName, database: DatabaseUrl = None) -> None:
    """One tenant with its keys, as JSON. The keys themselves are stored nowhere."""
    with _Records(database) as records:
        profile, is_live = records.directory.tenant(name)
        keys = [_key_document(key) for key in records.directory.keys(name)]
    document = {**profile.document(), "status": "live" if is_live else "revoked", "keys": keys}
    typer.echo(json.dumps(document, indent=2))


@tenants.command("key")
def key(name: TenantName, model: Models = None, lasts_days: LastsDays = None, database: DatabaseUrl = None) -> None:
    """Make one more key, for all the tenant's models or only some."""
    with _Records(database) as records:
        _show_key(records.directory.add_key(name, models=_models(model), lasts_s=_seconds(lasts_days)))


@tenants.command("rotate")
def rotate(
    name: TenantName,
    key: Annotated[str | None, typer.Option(help="Id of the old key; not needed if the tenant has one.")] = None,
    grace_hours: Annotated[float, typer.Option(min=0, help="How long the old key still works.")] = 24.0,
    database: DatabaseUrl = None,
) -> None:
    """Make a new key in place of an old one, which still works for a while."""
    with _Records(database) as records:
        old = key or _only_key(records.directory, name)
        _show_key(records.directory.rotate_key(name, old, grace_s=grace_hours * 3600))
        typer.echo(f"key {old} works for {grace_hours:g} more hours")


@tenants.command("revoke")
def revoke(
    name: TenantName,
    key: Annotated[str | None, typer.Option(help="Only the key of this id.")] = None,
    database: DatabaseUrl = None,
) -> None:
    """Shut out a key, or the whole tenant for good, with its batches and files. Takes effect within a few seconds."""
    with _Records(database) as records:
        if key is not None:
            records.directory.revoke_key(name, key)
        else:
            records.directory.revoke(name)
    typer.echo(f"revoked {name if key is None else key}")


def usage(  # noqa: PLR0917  the parameters of a command are its options
    start: Annotated[
        str | None, typer.Option(help="First day (UTC), e.g. 2026-11-01; 30 days back if not given.")
    ] = None,
    end: Annotated[str | None, typer.Option(help="Last day; today if not given.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of CSV.")] = False,
    forget_receipts_before: Annotated[
        str | None, typer.Option(help="Drop the single receipts of days before this one; the sums of the days stay.")
    ] = None,
    database: DatabaseUrl = None,
) -> None:
    """What was used: one line a day, tenant, model and adapter."""
    from omnilmm.tenancy.usage import to_csv

    last = _day(end) if end else datetime.now(UTC).date()
    first = _day(start) if start else last - timedelta(days=29)
    with _Records(database) as records:
        if forget_receipts_before:
            gone = records.ledger.forget_receipts(_day(forget_receipts_before))
            typer.echo(f"dropped {gone} receipts", err=True)
        days = records.ledger.days(first, last, tenant=tenant)
    typer.echo(json.dumps([day.document() for day in days], indent=2) if as_json else to_csv(days), nl=as_json)


# -- within -------------------------------------------------------------------------------------------

_LIMITS = ("requests_per_min", "tokens_per_min", "image_pixels_per_min", "concurrent_requests", "cache_bytes")


class _Records:
    """The database, closed at the end of the command."""

    def __init__(self, url: str | None) -> None:
        from deployments.settings import default_database
        from omnilmm.database import Database
        from omnilmm.tenancy.directory import Directory
        from omnilmm.tenancy.usage import Ledger

        self._database: Database = Database(url or default_database())
        self.directory = Directory(self._database)
        self.ledger = Ledger(self._database)

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()


def _changes(
    share: str | None,
    weight: float | None,
    priority: str | None,
    models: list[str] | None,
    limits: tuple[str | None, ...],
) -> dict[str, object]:
    """Only what was said. The values are checked where they are kept."""
    said: dict[str, object] = {"weight": weight, "priority": priority}
    changes = {name: value for name, value in said.items() if value is not None}
    if share is not None:
        changes["share"] = None if share == "none" else share
    if models:
        changes["models"] = _models(models)
    for name, limit in zip(_LIMITS, limits, strict=True):
        if limit is not None:
            changes[name] = _limit(limit, name)
    return changes


def _models(names: list[str] | None) -> list[str] | None:
    return None if not names or names == ["all"] else names


def _limit(text: str, name: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise typer.BadParameter(f"--{name.replace('_', '-')} takes a number or none")
    return int(text)


def _seconds(days: float | None) -> float | None:
    return None if days is None else days * DAY_S


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a day like 2026-11-23") from None


def _only_key(directory: Directory, name: str) -> str:
    now = datetime.now(UTC).timestamp()
    live = [info.id for info in directory.keys(name) if info.is_live(now)]
    if len(live) != 1:
        raise typer.BadParameter(f"{name} has {len(live)} live keys: name one with --key (omnilmm tenants show {name})")
    return live[0]


def _show_key(new: NewKey) -> None:
    typer.echo(f"key (shown once):  {new.secret}\nid of the key:     {new.info.id}")


def _key_document(info: KeyInfo) -> dict[str, Any]:
    def spell(at: float | None) -> str | None:
        return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")

    times = {name: spell(getattr(info, name)) for name in ("created_at", "expires_at", "revoked_at")}
    return {**info.document(), **times}
