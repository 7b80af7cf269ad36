"""Which URLs and addresses are places to fetch from: rows U01, U02, U05 and U06 without any network."""

from __future__ import annotations

import ipaddress

import pytest
from fuzzing import FUZZ
from hypothesis import given
from hypothesis import strategies as st

from omnilmm.image.address import AllowList, BadAddress, Target, is_public, parse_url, public_addresses

ANYWHERE = AllowList(hosts=("*", "*:8443"))


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://example.org", Target("https", "example.org", 443, "/")),
        ("HTTPS://EXAMPLE.org:8443/a/b.png?c=%20d&e", Target("https", "example.org", 8443, "/a/b.png?c=%20d&e")),
        ("http://example.org/", Target("http", "example.org", 80, "/")),
        ("https://example.org?a=b", Target("https", "example.org", 443, "/?a=b")),
        ("https://xn--bcher-kva.example/", Target("https", "xn--bcher-kva.example", 443, "/")),
        ("https://93.184.216.34/", Target("https", "93.184.216.34", 443, "/")),
        ("https://[2606:2800:0220:1::]/", Target("https", "2606:2800:220:1::", 443, "/")),
    ],
)
def test_good_urls(url: str, target: Target) -> None:
    assert parse_url(url) == target


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("https://Example.org:443/", "example.org"),
        ("http://example.org:443/", "example.org:443"),
        ("https://[2606:2800:220:1::]:8443/", "[2606:2800:220:1::]:8443"),
    ],
)
def test_what_the_host_header_says(url: str, authority: str) -> None:
    assert parse_url(url).authority == authority


BAD = [
    # U01: other spellings of loopback
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f.1/",
    "https://0x7f000001/",
    "https://017700000001/",
    "https://0177.0.0.1/",
    "https://127.0.0.01/",
    "https://1.2.3/",
    "https://1.2.3.4.5/",
    "https://256.1.1.1/",
    "https://localhost./",
    "https://127.0.0.1./",
    "https://[::1%25lo]/",
    "https://[fe80::1%eth0]/",
    "https://[::1/",
    "https://::1/",
    "https://[1.2.3.4]/",
    # U05: what two readers could take for different places
    "http://127.0.0.1:6666\\@1.1.1.1",
    "https://user@example.org/",
    "https://user:password@example.org/",
    "https://example.org@127.0.0.1/",
    "https://example.org#@127.0.0.1/",
    "https://exam\tple.org/",
    "https://example.org/\r\nHost: evil",
    "https://example.org/a b",
    " https://example.org/",
    "https://example.org/\n",
    "https://example。org/",
    "https://１２７.0.0.1/",
    "https://bücher.example/",
    "https://example.org/ü",
    "https://exa_mple.org/",
    "https://-example.org/",
    "https://example-.org/",
    "https://exa..mple.org/",
    "https://.example.org/",
    "https:///path",
    "https://",
    "https://example.org:/",
    "https://example.org:0/",
    "https://example.org:65536/",
    "https://example.org:99999/",
    "https://example.org:443:443/",
    "https://example.org/%",
    "https://example.org/%zz",
    "https://example.org/#fragment",
    "https:/example.org/",
    "https:example.org",
    "//example.org/",
    "https://" + "a." * 126 + "ab/",
    "https://" + "a" * 64 + ".org/",
    "https://example.org/" + "a" * 4096,
    # U06
    "file:///etc/passwd",
    "ftp://example.org/",
    "gopher://example.org/",
    "/etc/passwd",
    "blob:https://example.org/1",
    "",
]


@pytest.mark.parametrize("url", BAD)
def test_bad_urls(url: str) -> None:
    with pytest.raises(BadAddress) as refusal:
        parse_url(url)
    assert not url.strip("/") or url not in str(refusal.value)


PRIVATE = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255"),
    *("192.168.0.1", "169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.0.9", "192.0.2.1"),
    *("192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1"),
    *("255.255.255.255",),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "fe80::1", "fe80::1%1", "fec0::1"),
    *("fc00::1", "fd00:ec2::254", "ff02::1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1"),
    *("2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "4000::1", "5f00::1"),
]  # fmt: skip
PUBLIC = ["8.8.8.8", "93.184.216.34", "1.1.1.1", "100.63.255.255", "2606:2800:220:1::1", "2a00:1450::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    assert public_addresses([address]) == ()
    assert public_addresses(["8.8.8.8", address]) == ()  # U04: one bad answer spoils all


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
    assert public_addresses([address, address]) == (ipaddress.ip_address(address),)


def test_no_address_is_no_public_address() -> None:
    assert public_addresses([]) == ()


@pytest.mark.parametrize(
    ("hosts", "url", "is_allowed"),
    [
        ((), "https://example.org/", False),
        (("example.org",), "https://example.org/", True),
        (("example.org",), "http://example.org/", True),
        (("example.org",), "https://EXAMPLE.ORG/", True),
        (("example.org",), "https://www.example.org/", False),
        (("example.org",), "https://example.org.evil.com/", False),
        (("example.org",), "https://evilexample.org/", False),
        (("example.org",), "https://example.org:22/", False),
        (("example.org",), "https://example.org:6379/", False),
        (("example.org",), "https://example.org:80/", True),
        (("example.org:8443",), "https://example.org:8443/", True),
        (("example.org:8443",), "https://example.org/", False),
        (("*.example.org",), "https://www.example.org/", True),
        (("*.example.org",), "https://a.b.example.org/", True),
        (("*.example.org",), "https://example.org/", False),
        (("*.example.org",), "https://evilexample.org/", False),
        (("*",), "https://example.org/", True),
        (("*",), "https://localhost/", False),
        (("*",), "https://redis/", False),
        (("*",), "https://8.8.8.8/", True),
        (("*",), "https://example.org:25/", False),
        (("8.8.8.8",), "https://8.8.8.8/", True),
        (("[2606:2800:220:1::]",), "https://[2606:2800:0220:1:0::]/", True),
    ],
)
def test_the_allow_list(hosts: tuple[str, ...], url: str, is_allowed: bool) -> None:
    assert AllowList(hosts).allows(parse_url(url)) is is_allowed


def test_internal_hosts_are_named_whole() -> None:
    allowed = AllowList(internal=("minio.internal:9000", "10.0.0.5"))
    assert allowed.is_internal(parse_url("http://minio.internal:9000/a"))
    assert allowed.is_internal(parse_url("https://10.0.0.5/a"))
    assert not allowed.allows(parse_url("http://minio.internal/a"))
    assert not AllowList(hosts=("minio.internal",)).is_internal(parse_url("http://minio.internal/a"))


@pytest.mark.parametrize(
    "entry",
    ["", "https://example.org", "example.org/", "Example.org", "exa mple", "*.*.org", "a*", "1.2.3", "example.org:0"],
)
def test_entries_that_are_no_hosts(entry: str) -> None:
    with pytest.raises(ValueError, match="host"):
        AllowList(hosts=(entry,))


@pytest.mark.parametrize("entry", ["*", "*.example.org"])
def test_no_pattern_may_lead_inside(entry: str) -> None:
    with pytest.raises(ValueError, match="host"):
        AllowList(internal=(entry,))


# -- anything at all ----------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *(
            "http",
            "https",
            "://",
            ":",
            "/",
            "//",
            "@",
            "#",
            "?",
            "\\",
            "%",
            "%2f",
            ".",
            "..",
            "[",
            "]",
            "[::1]",
            "127.0.0.1",
        ),
        *(
            "0x7f.1",
            "localhost",
            "example.org",
            "ffff",
            "::",
            "1",
            "443",
            "65536",
            "\t",
            "\r\n",
            " ",
            "\u3002",
            "\uff0e",
        ),
        *("\u0130", "xn--", "*"),
    ]
)


@FUZZ
@given(st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join) | st.text(max_size=60))
def test_a_url_is_refused_or_read_as_every_reader_would(url: str) -> None:
    try:
        target = parse_url(url)
    except BadAddress:
        return
    from urllib.parse import urlsplit

    import httpx

    assert url.isascii()
    split, parsed = urlsplit(url), httpx.URL(url)
    assert split.username is None
    assert split.hostname is not None
    assert parsed.scheme == split.scheme == target.scheme
    assert (split.port or {"http": 80, "https": 443}[target.scheme]) == target.port
    if target.literal is None:
        assert split.hostname.lower() == parsed.host == target.host
    else:
        assert ipaddress.ip_address(split.hostname) == ipaddress.ip_address(parsed.host) == target.literal
    ANYWHERE.allows(target)


@FUZZ
@given(st.ip_addresses())
def test_public_means_public_to_the_standard_library_too(address: ipaddress.IPv4Address) -> None:
    if is_public(address):
        assert address.is_global
        kinds = ("private", "loopback", "link_local", "multicast", "reserved", "unspecified")
        assert not any(getattr(address, f"is_{kind}") for kind in kinds)
        assert not any(getattr(address, inner, None) for inner in ("ipv4_mapped", "sixtofour", "teredo"))
