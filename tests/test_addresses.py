"""The endpoints, as they are written, and which of them exclude each other."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gserver.addresses import (
    TCP,
    TLS,
    UNIX,
    Endpoint,
    client_address,
    parse_endpoint,
    show_endpoints,
)
from gserver.config import Config, parse_bind

ENDPOINTS = {
    "tcp://0.0.0.0:4242": Endpoint(TCP, "0.0.0.0", 4242),
    "tls://[::]:0": Endpoint(TLS, "::", 0),
    "tcp://localhost:65535": Endpoint(TCP, "localhost", 65535),
    "unix:/run/gserver.sock": Endpoint(UNIX, path="/run/gserver.sock"),
    "unix:gserver.sock?mode=0600": Endpoint(UNIX, path="gserver.sock", mode=0o600),
    "unix:/run/g?mode=0777": Endpoint(UNIX, path="/run/g", mode=0o777),
    "unix:/" + "x" * 106: Endpoint(UNIX, path="/" + "x" * 106, port=0),
}


@pytest.mark.parametrize("text", ENDPOINTS)
def test_an_endpoint_is_a_url(text: str) -> None:
    assert parse_endpoint(text) == ENDPOINTS[text]
    assert str(ENDPOINTS[text]) == text


def test_a_socket_file_may_be_written_as_in_a_url_with_an_empty_host() -> None:
    assert parse_endpoint("unix:///run/g?mode=600") == Endpoint(UNIX, path="/run/g", mode=0o600)


def test_several_endpoints_are_one_text() -> None:
    assert parse_bind("  tcp://a:1\tunix:b ") == "tcp://a:1 unix:b"
    endpoints = tuple(map(parse_endpoint, ENDPOINTS))
    assert Config(bind=show_endpoints(endpoints)).endpoints == endpoints


NO_ENDPOINT = r"is not an endpoint: use tcp://HOST:PORT, tls://HOST:PORT or unix:PATH"
NO_PATH = "is not unix:PATH with a path of printable ASCII"
INVALID = {
    "": NO_ENDPOINT,
    "4242": NO_ENDPOINT,
    "127.0.0.1:4242": NO_ENDPOINT,
    "tcp:127.0.0.1:4242": NO_ENDPOINT,
    "tcp://": NO_ENDPOINT,
    "tcp://a": "has no port",
    "tcp://:4242": "has no host: 0.0.0.0 or :: stand for all",
    "tcp://a:70000": "the port is a number from 0 to 65535, and IPv6 has brackets",
    "tcp://a:x": "the port is a number from 0 to 65535, and IPv6 has brackets",
    "tcp://::1:4242": "the port is a number from 0 to 65535, and IPv6 has brackets",
    "tcp://[::1:4242": "the port is a number from 0 to 65535, and IPv6 has brackets",
    "tcp://a:1/path": NO_ENDPOINT,
    "tcp://a:1?mode=0660": NO_ENDPOINT,
    "tcp://[::1]x:1": "is not HOST:PORT after tcp://",
    "tcp://a:01": "is not HOST:PORT after tcp://",
    "udp://a:1": NO_ENDPOINT,
    "TCP://a:1": NO_ENDPOINT,
    "tcp://me@a:1": "contains a user name: remove it",
    "unix:": NO_PATH,
    "unix:?mode=0660": NO_PATH,
    "unix:/run/": NO_PATH,
    "unix://run/g": NO_PATH,
    "unix:/run/ü": NO_PATH,
    "unix:/run/my file": NO_PATH,
    "unix:@abstract": NO_PATH,
    "unix:/" + "x" * 107: "too long for a socket: at most 107",
    "unix:/g?mode=8": "not a mode in octal digits",
    "unix:/g?mode=": "not a mode in octal digits",
    "unix:/g?user=me": "not a mode in octal digits",
    "unix:/g?": "not a mode in octal digits",
    "unix:/g?mode=1000": "more than read, write and execute",
    "unix:/g?mode=1777": "more than read, write and execute",
}


@pytest.mark.parametrize("text", INVALID)
def test_what_is_no_endpoint_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ValueError, match=INVALID[text]) as caught:
        parse_endpoint(text)
    assert "\n" not in str(caught.value)


@given(
    st.sampled_from(["tcp://", "tls://", "unix:", "unix://", ""]),
    st.text(alphabet="/[]:.ax?mode=0@# ", max_size=12),
    st.sampled_from(["", ":1", "?mode=0660"]),
)
def test_any_text_is_an_endpoint_or_refused(scheme: str, rest: str, end: str) -> None:
    try:
        endpoint = parse_endpoint(scheme + rest + end)
    except ValueError:
        return
    assert parse_endpoint(str(endpoint)) == endpoint


def test_no_endpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="it names no endpoint"):
        parse_bind(" ")


COLLISIONS = [
    ("tcp://127.0.0.1:1 tls://127.0.0.1:1", True),
    ("tcp://0.0.0.0:1 tcp://127.0.0.1:1", True),
    ("tcp://a:1 tcp://a:1", True),
    ("unix:/g unix:/g?mode=0600", True),
    # With both, `::` has IPv6 alone.
    ("tcp://0.0.0.0:1 tcp://[::]:1", False),
    ("tcp://127.0.0.1:1 tcp://[::]:1", False),
    ("tcp://127.0.0.1:1 tcp://[0::0]:1", False),
    ("tcp://127.0.0.1:1 tcp://127.0.0.1:2 tcp://127.0.0.2:1 unix:/g unix:/h", False),
    ("tcp://127.0.0.1:0 tcp://127.0.0.1:0", False),
]


@pytest.mark.parametrize(("bind", "collides"), COLLISIONS)
def test_two_endpoints_cannot_have_one_address(bind: str, *, collides: bool) -> None:
    assert bool(Config(bind=bind).port_collision) is collides


def test_an_endpoint_cannot_have_the_admin_port() -> None:
    config = Config(bind="unix:/g tcp://0.0.0.0:4243", admin_port=4243)
    assert config.port_collision == (
        "--bind tcp://0.0.0.0:4243 and --admin-port 4243 overlap: change one"
    )


@pytest.mark.parametrize(
    ("bind", "cert", "reason"),
    [
        ("tls://a:1", "", "an endpoint with TLS .* needs --tls-cert"),
        ("tcp://a:1 unix:/g", "c.pem", "--tls-cert is not used: add --bind tls://HOST:PORT"),
        ("tcp://a:1 tls://a:2", "c.pem", "$"),
    ],
)
def test_tls_needs_a_certificate_and_the_other_way_round(bind: str, cert: str, reason: str) -> None:
    assert re.match(reason, Config(bind=bind, tls_cert=cert).endpoint_contradiction)


def test_proxy_headers_need_an_endpoint_that_takes_them() -> None:
    both = Config(bind="unix:/g tcp://a:1", proxy_from="10.0.0.0/8")
    assert not both.endpoint_contradiction
    only = Config(bind="unix:/g unix:/h", proxy_from="10.0.0.0/8")
    assert (
        only.endpoint_contradiction == "--proxy-from is not used: socket files take no PROXY header"
    )


def test_a_limit_for_each_address_needs_an_endpoint_with_addresses() -> None:
    both = Config(bind="unix:/g tcp://a:1", max_clients_per_address=5)
    assert not both.endpoint_contradiction
    only = Config(bind="unix:/g", max_clients_per_address=5)
    assert only.endpoint_contradiction.startswith("--max-clients-per-address is not used")


def test_without_bind_there_is_one_endpoint() -> None:
    assert Config(host="::", port=1).endpoints == (Endpoint(TCP, "::", 1),)
    assert Config(tls_cert="c.pem").endpoints == (Endpoint(TLS, "127.0.0.1", 4242),)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        (("192.0.2.1", 5), ("192.0.2.1", 5)),
        (("::ffff:192.0.2.1", 5, 0, 0), ("192.0.2.1", 5)),
        (("fd00::1", 5, 0, 0), ("fd00::1", 5)),
        ("", (UNIX, 0)),
        ("/run/of-the-client", (UNIX, 0)),
        (b"\0abstract", (UNIX, 0)),
    ],
)
def test_a_client_has_an_address_and_a_port(name: object, address: tuple[str, int]) -> None:
    assert client_address(name) == address
