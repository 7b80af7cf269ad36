"""``base:adapter``: who sees it, and what the decoder is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from deployments.adapters import AdapterDecoder, catalog_of, served_to
from deployments.settings import Adapters
from omnilmm.errors import NotFound
from omnilmm.messages import GenerateCall, Prompt, Sampling, TokenBatch
from omnilmm.tenancy.tenant import Tenant


@dataclass
class Asked:
    calls: list[GenerateCall] = field(default_factory=list)

    async def generate(self, call, *, affinity):
        self.calls.append(call)
        yield TokenBatch(ids=(1,))


def call_of(tenant):
    return GenerateCall("r", Prompt((1,), (), ()), (), Sampling(max_tokens=1), tenant=tenant)


async def test_only_owners_reach_the_decoder_and_it_is_told_the_adapter():
    base = Asked()
    decoder = AdapterDecoder(base, "a", frozenset({"acme"}))
    assert [batch.ids async for batch in decoder.generate(call_of("acme"), affinity="")] == [(1,)]
    with pytest.raises(NotFound) as caught:
        await anext(decoder.generate(call_of("other"), affinity=""))
    assert caught.value.code == "model_not_found"
    assert [call.adapter for call in base.calls] == ["a"]


def test_what_is_another_s_does_not_exist():
    flows = {
        "m": SimpleNamespace(decoder=Asked()),
        "m:all": SimpleNamespace(decoder=AdapterDecoder(Asked(), "all", None)),
        "m:own": SimpleNamespace(decoder=AdapterDecoder(Asked(), "own", frozenset({"acme"}))),
    }
    assert served_to(Tenant("acme", "acme"), flows) == ["m", "m:all", "m:own"]
    assert served_to(Tenant("other", "other"), flows) == ["m", "m:all"]


def test_a_folder_and_single_paths_make_one_catalog(tmp_path):
    (tmp_path / "folder" / "a").mkdir(parents=True)
    settings = Adapters(folder=str(tmp_path / "folder"), paths={"b": str(tmp_path)})
    assert catalog_of(settings).names() == ("a", "b")


@pytest.mark.parametrize("wrong", [{"paths": {"../x": "p"}}, {"paths": {"a:b": "p"}}, {"max_rank": 0}, {"other": 1}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="validation error"):
        Adapters.model_validate(wrong)
