"""What serve_config.yaml may say of pictures on other servers."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from deployments.settings import RemoteImages
from omnilmm.config import ImageLimits
from omnilmm.image.address import parse_url


def test_off_unless_a_host_is_named():
    assert RemoteImages().policy(ImageLimits()) is None


def test_what_is_said_arrives():
    said = {
        "hosts": ["a.example"],
        "internal_hosts": ["b:9000"],
        "allow_http": True,
        "max_redirects": 2,
        "timeout_s": 3,
    }
    policy = RemoteImages.model_validate(said | {"max_per_tenant": 5}).policy(ImageLimits(max_file_bytes=7))
    assert policy is not None
    assert policy.hosts.allows(parse_url("https://a.example/"))
    assert policy.hosts.is_internal(parse_url("http://b:9000/"))
    assert (policy.allows_http, policy.max_redirects, policy.timeout_s, policy.max_bytes) == (True, 2, 3.0, 7)
    assert (policy.max_per_tenant, policy.max_at_once) == (5, 64)


def test_defaults_are_safe():
    policy = RemoteImages(hosts=["a.example"]).policy(ImageLimits())
    assert policy is not None
    assert (policy.allows_http, policy.max_redirects, policy.timeout_s) == (False, 0, 10.0)


@pytest.mark.parametrize(
    "said",
    [
        {"hosts": ["https://a.example"]},
        {"internal_hosts": ["*"]},
        {"max_redirects": 11},
        {"timeout_s": 0},
        {"proxy": "x"},
    ],
)
def test_what_makes_no_sense_is_refused(said):
    with pytest.raises(ValidationError):
        RemoteImages.model_validate(said)
