"""The OpenAPI document is true: whatever it allows is answered as it says, and what it forbids is refused.

Every phase of Schemathesis with a few examples for each operation, always the same;
``pytest tests/deployments/test_openapi_truth.py --hypothesis-profile=thorough`` runs 600 random ones.

What is not checked: that whatever fits the schema is accepted. Rules between fields (`top_logprobs` needs `logprobs`)
and about the order of messages are in the words of the documentation only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from http_fakes import Decoder, make_card, make_flow, make_service, storage_parts
from hypothesis import settings
from live_server import live
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished

from omnilmm.tenancy.directory import Directory
from omnilmm.tenancy.keys import AdminKeys, KeyBook, KeyRecord, Tenant, new_key
from omnilmm.tenancy.usage import Ledger

MODEL = "omnilmm-3b"
KEY, DIGEST = new_key()
ADMIN_KEY, ADMIN_DIGEST = new_key()
IS_THOROUGH = settings.get_current_profile_name() == "thorough"


@pytest.fixture(scope="module")
def url(data, tmp_path_factory) -> Iterator[str]:
    flow = make_flow(make_card(data, MODEL), Decoder())
    root = tmp_path_factory.mktemp("truth")
    stored = storage_parts(root)
    database = stored["files"].database

    async def erase_picture(tenant: Tenant, data: bytes) -> None:
        return None

    service = make_service(
        {MODEL: flow},
        keys=KeyBook([KeyRecord(DIGEST, Tenant("acme", "acme"))]),
        admins=AdminKeys([ADMIN_DIGEST]),
        max_body_bytes=8 << 20,
        directory=Directory(database),
        usage_ledger=Ledger(database),
        erase_picture=erase_picture,
        **stored,
    )
    with live(service) as base:
        yield base
    database.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def with_a_model(node: Any) -> Any:
    """The document with the one model we have in place of any name, so that examples reach beyond the 404."""
    if isinstance(node, list):
        return [with_a_model(item) for item in node]
    if not isinstance(node, dict):
        return node
    inner = {name: with_a_model(item) for name, item in node.items()}
    if inner.get("required", ()) and "model" in (properties := inner.get("properties", {})):
        inner["properties"] = properties | {"model": {"const": MODEL}}
    return inner


def config(max_examples: int) -> SchemathesisConfig:
    deterministic = not IS_THOROUGH
    return SchemathesisConfig.from_dict(
        {
            **({"seed": 1} if deterministic else {}),
            "generation": {"max-examples": max_examples, "deterministic": deterministic, "database": "none"},
            "continue-on-failure": True,
            "suppress-health-check": ["all"],
            "checks": {
                "positive_data_acceptance": {"enabled": False},
                # a repeated Idempotency-Key gives the first answer again, also about a file that is deleted by now
                "ensure_resource_availability": {"enabled": False},
                "negative_data_rejection": {
                    "expected-statuses": ["400", "401", "403", "404", "405", "409", "413", "415", "422"]
                },
            },
            "cache": {"enabled": False},
        }
    )


def run(document: dict[str, Any], url: str, key: str, max_examples: int) -> tuple[Counter[int], list[str]]:
    """Statuses by how often they came, and what was wrong."""
    made = config(max_examples)
    schema = schemathesis.openapi.from_dict(document, config=made)
    schema.config.update(base_url=url, headers=bearer(key))
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    for event in from_schema(schema).execute():
        if isinstance(event, (FatalError, NonFatalError)):
            wrong.append(str(getattr(event, "exception", None) or getattr(event, "value", event)))
        if not isinstance(event, ScenarioFinished):
            continue
        for interaction in event.recorder.interactions.values():
            if interaction.response is not None:
                statuses[interaction.response.status_code] += 1
        for case_id, checks in event.recorder.checks.items():
            for check in checks:
                if check.failure_info is not None:
                    case = event.recorder.cases[case_id].value
                    wrong.append(
                        f"{event.recorder.label}: {check.name}: {check.failure_info.failure} {case.body!r:.500}"
                    )
    return statuses, wrong


def test_the_document_is_true(url):
    document = httpx.get(f"{url}/openapi.json", headers=bearer(KEY)).json()
    operators = {path: document["paths"].pop(path) for path in ["/metrics"]}
    statuses, wrong = run(with_a_model(document), url, KEY, 600 if IS_THOROUGH else 8)
    print(dict(statuses))  # shown by -s
    assert not wrong, "\n".join(wrong[:20])
    assert not any(status >= 500 for status in statuses)
    assert statuses[200] > 20
    assert sum(statuses.values()) > (3000 if IS_THOROUGH else 300)
    statuses, wrong = run(document | {"paths": operators}, url, ADMIN_KEY, 3)
    assert not wrong, "\n".join(wrong[:20])
    assert statuses[200] > 0


def test_the_document_is_whole(url):
    document = httpx.get(f"{url}/openapi.json", headers=bearer(KEY)).json()
    assert "$ref" not in json.dumps(document)
    assert document["security"] == [{"key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"]
            assert "HTTPValidationError" not in json.dumps(operation)
            if path not in ("/health", "/ready"):
                assert {"401", "500"} <= operation["responses"].keys()
