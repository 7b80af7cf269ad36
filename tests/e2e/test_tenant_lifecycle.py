"""A tenant's life on a real cluster: added, its keys changed, streaming, revoked in the middle of it; what is left."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from e2e_cluster import Cluster, application, model_settings, wait_until

from omnilmm.api.sse import EventReader
from omnilmm.database import Database
from omnilmm.tenancy.directory import Directory
from omnilmm.tenancy.usage import Ledger

pytestmark = pytest.mark.e2e

MODEL = "omnilmm-3b"
ENDED_WITHIN_S = 30.0  # 2 seconds and a query, on a machine that may be ten times slower


@pytest.fixture(scope="module")
def database_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('tenants') / 'omnilmm.db'}"


@pytest.fixture(scope="module")
def url(cluster: Cluster, data: Path, database_url: str) -> Iterator[str]:
    """An application with a database of its own beside the others, which stay open."""
    args = {"models": [model_settings(data, MODEL)], "database": database_url}
    with application("tenants", args) as prefix:
        yield cluster.url + prefix


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


def status(url: str, key: str) -> int:
    return httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code


def test_keys_are_rotated_and_expire(url: str, database: Database) -> None:
    directory = Directory(database)
    directory.add("initech", {})
    first, brief = directory.add_key("initech"), directory.add_key("initech", lasts_s=15)
    wait_until(lambda: status(url, "no-key") == 401, "the first key closes the server")
    wait_until(lambda: status(url, first.secret) == status(url, brief.secret) == 200, "the keys work")
    second = directory.rotate_key("initech", first.info.id, grace_s=0)
    wait_until(lambda: status(url, first.secret) == 401, "the old key is dead")
    assert status(url, second.secret) == 200  # both changed in one transaction
    wait_until(lambda: status(url, brief.secret) == 401, "the brief key has had its time")
    assert status(url, second.secret) == 200


def test_a_tenant_is_revoked_in_the_middle_of_its_streams(url: str, database: Database) -> None:
    directory = Directory(database)
    directory.add("acme", {"cache_bytes": 1 << 20})
    key = directory.add_key("acme").secret
    mine = {"Authorization": f"Bearer {key}"}
    wait_until(lambda: httpx.get(f"{url}/v1/models").status_code == 401, "the server is closed")
    wait_until(lambda: httpx.get(f"{url}/v1/models", headers=mine).status_code == 200, "the key works")
    with httpx.Client(timeout=60, headers=mine) as client:
        stored = client.post(f"{url}/v1/files", data={"purpose": "user_data"}, files={"file": ("a", b"text")}).json()
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Count."}],
            "max_tokens": 3800,
            "ignore_eos": True,
            "stream": True,
            "n": 2,
        }
        reader, events = EventReader(), []
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            pieces = response.iter_bytes()
            events += reader.feed(next(pieces))
            directory.revoke("acme")
            begun = time.monotonic()
            for piece in pieces:
                events += reader.feed(piece)
            assert time.monotonic() - begun < ENDED_WITHIN_S
        assert json.loads(events[-1].data)["error"]["code"] == "invalid_api_key"
        assert client.get(f"{url}/v1/files/{stored['id']}").status_code == 401

    def receipts() -> list:
        today = datetime.now(UTC).date()
        return [each for each in Ledger(database).receipts(today, today) if each.tenant == "acme"]

    wait_until(lambda: len(receipts()) == 1, "the receipt is written")
    (receipt,) = receipts()
    assert (receipt.model, receipt.adapter, receipt.status) == (MODEL, "", 401)
    assert 0 < receipt.completion_tokens < 2 * 3800
    assert receipt.prompt_tokens > 0

    def num_files() -> int:
        with database.read() as connection:
            return connection.exec_driver_sql("select count(*) from files where tenant = 'acme'").scalar_one()

    wait_until(lambda: num_files() == 0, "the tenant's files are gone")
