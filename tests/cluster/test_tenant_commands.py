"""The operator's commands on a database, without any server."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, date, datetime

import pytest
import typer
from typer.testing import CliRunner

from cluster.tenants import tenants, usage
from deployments.settings import default_database
from omnilmm.database import Database
from omnilmm.errors import OmniError
from omnilmm.tenancy.directory import Directory
from omnilmm.tenancy.keys import KeyBook
from omnilmm.tenancy.usage import Ledger, Receipt

NOW = datetime.now(UTC).timestamp()


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/omnilmm.db"


@pytest.fixture
def run(url):
    app = typer.Typer()
    app.add_typer(tenants, name="tenants")
    app.command("usage")(usage)

    def run(*words, status=0):
        result = CliRunner().invoke(app, [*map(str, words)], env={"OMNILMM_DATABASE": url, "COLUMNS": "200"})
        if isinstance(result.exception, OmniError):
            assert status == 1
            return result.exception.message
        assert result.exit_code == status, result.output
        return result.output

    return run


@pytest.fixture
def database(url):
    database = Database(url)
    yield database
    database.close()


def key_in(said):
    return said.split("(shown once):")[1].split()[0]


def id_in(said):
    return said.split("id of the key:")[1].split()[0]


def opens(database, key):
    book = KeyBook()
    book.learn(Directory(database).roster())
    try:
        return book.authenticate([f"Bearer {key}"], None)
    except OmniError:
        return None


def test_a_tenant_from_the_command_line(run, database):
    options = ("--tokens-per-min", 100, "--model", "a", "--model", "b", "--priority", "batch", "--share", "x")
    said = run("tenants", "add", "acme", *options, "--lasts-days", 1)
    tenant = opens(database, key_in(said))
    assert (tenant.limits.tokens_per_min, tenant.models, tenant.scope) == (100, {"a", "b"}, "+x")
    shown = json.loads(run("tenants", "show", "acme"))
    assert shown["keys"][0]["id"] == id_in(said)
    assert shown["keys"][0]["expires_at"] > shown["keys"][0]["created_at"]
    assert key_in(said) not in run("tenants", "show", "acme")
    run("tenants", "set", "acme", "--tokens-per-min", "none", "--model", "all", "--share", "none", "--weight", 2)
    tenant = opens(database, key_in(said))
    assert (tenant.limits.tokens_per_min, tenant.models, tenant.scope, tenant.weight) == (None, None, "acme", 2.0)
    assert "acme" in run("tenants", "list")


def test_keys_from_the_command_line(run, database):
    first = run("tenants", "add", "acme")
    rotated = run("tenants", "rotate", "acme", "--grace-hours", 0)
    assert opens(database, key_in(first)) is None
    assert opens(database, key_in(rotated))
    more = run("tenants", "key", "acme", "--model", "a")
    assert opens(database, key_in(more)).models == {"a"}
    assert "name one with --key" in run("tenants", "rotate", "acme", status=2)
    run("tenants", "revoke", "acme", "--key", id_in(more))
    assert opens(database, key_in(more)) is None
    run("tenants", "revoke", "acme")
    assert opens(database, key_in(rotated)) is None
    assert "revoked" in run("tenants", "list")


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (("tenants", "add", "*"), 1, "must be 1 to 64"),
        (("tenants", "add", "b", "--tokens-per-min", "many"), 2, "a number or none"),
        (("tenants", "add", "b", "--priority", "first"), 1, "one of online, batch"),
        (("tenants", "set", "acme"), 2, "say what to change"),
        (("tenants", "set", "nobody", "--weight", "1"), 1, "no such tenant"),
        (("tenants", "show", "nobody"), 1, "no such tenant"),
        (("tenants", "list", "--database", "mysql://x"), 1, "only sqlite"),
        (("usage", "--start", "monday"), 2, "is not a day"),
    ],
)
def test_what_is_wrong_is_said(run, words, status, complaint):
    assert complaint in " ".join(run(*words, status=status).replace("│", " ").split())


def test_usage_from_the_command_line(run, database):
    ledger = Ledger(database)
    about = {"tenant": "acme", "key_id": "k", "model": "m", "status": 200, "request_id": "r"}
    ledger.write([Receipt(at=NOW, prompt_tokens=5, **about), Receipt(at=NOW - 3 * 86_400, **about)])
    rows = list(csv.DictReader(io.StringIO(run("usage"))))
    assert sum(int(row["prompt_tokens"]) for row in rows) == 5
    assert len(json.loads(run("usage", "--json", "--tenant", "acme"))) == 2
    assert run("usage", "--tenant", "other").count("\n") == 1
    run("usage", "--forget-receipts-before", datetime.fromtimestamp(NOW - 86_400, UTC).date().isoformat())
    assert len(ledger.receipts(date(2000, 1, 1), date(2100, 1, 1))) == 1


def test_the_default_database_is_this_user_s(monkeypatch, tmp_path):
    monkeypatch.delenv("OMNILMM_DATABASE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_database() == f"sqlite:///{tmp_path}/omnilmm/omnilmm.db"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_database() == "sqlite:////home/someone/.local/state/omnilmm/omnilmm.db"
