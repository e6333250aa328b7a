"""The ways in, as they are written, and which of them exclude each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gserver.addresses import TCP, TLS, UNIX, Way, parse_way, peer, show_ways
from gserver.config import Config, parse_bind

WAYS = {
    "tcp://0.0.0.0:4242": Way(TCP, "0.0.0.0", 4242),
    "tls://[::]:0": Way(TLS, "::", 0),
    "tcp://localhost:65535": Way(TCP, "localhost", 65535),
    "unix:/run/gserver.sock": Way(UNIX, path="/run/gserver.sock"),
    "unix:gserver.sock?mode=0600": Way(UNIX, path="gserver.sock", mode=0o600),
    "unix:/run/g?mode=0777": Way(UNIX, path="/run/g", mode=0o777),
}


@pytest.mark.parametrize("text", WAYS)
def test_a_way_in_is_a_url(text: str) -> None:
    assert parse_way(text) == WAYS[text]
    assert str(WAYS[text]) == text


def test_a_socket_file_may_be_written_as_in_a_url_with_an_empty_host() -> None:
    assert parse_way("unix:///run/g?mode=600") == Way(UNIX, path="/run/g", mode=0o600)


def test_several_ways_in_are_one_text() -> None:
    assert parse_bind("  tcp://a:1\tunix:b ") == "tcp://a:1 unix:b"
    ways = tuple(map(parse_way, WAYS))
    assert Config(bind=show_ways(ways)).ways == ways


NO_WAY = r"is not a way in: use tcp://HOST:PORT, tls://HOST:PORT or unix:PATH"
INVALID = {
    "": NO_WAY,
    "4242": NO_WAY,
    "127.0.0.1:4242": NO_WAY,
    "tcp:127.0.0.1:4242": NO_WAY,
    "tcp://": NO_WAY,
    "tcp://a": NO_WAY,
    "tcp://:4242": NO_WAY,
    "tcp://a:70000": NO_WAY,
    "tcp://a:x": NO_WAY,
    "tcp://[::1:4242": NO_WAY,
    "tcp://a:1/path": NO_WAY,
    "tcp://a:1?mode=0660": NO_WAY,
    "udp://a:1": NO_WAY,
    "TCP://a:1": NO_WAY,
    "tcp://me@a:1": "has a user name",
    "unix:": "names no file",
    "unix:?mode=0660": "names no file",
    "unix:/run/": "names no file",
    "unix://run/g": "names no file",
    "unix:/run/ü": "names no file",
    "unix:/" + "x" * 107: "too long for a socket: at most 107",
    "unix:/g?mode=8": "not a mode in octal digits",
    "unix:/g?mode=": "not a mode in octal digits",
    "unix:/g?user=me": "not a mode in octal digits",
    "unix:/g?": "not a mode in octal digits",
    "unix:/g?mode=1777": "more than read, write and execute",
}


@pytest.mark.parametrize("text", INVALID)
def test_what_is_no_way_in_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ValueError, match=INVALID[text]) as caught:
        parse_way(text)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="tcpls:/[]u.nix?mode=0123@# ", max_size=40))
def test_any_text_is_a_way_in_or_refused(text: str) -> None:
    try:
        way = parse_way(text)
    except ValueError:
        return
    assert parse_way(str(way)) == way


COLLISIONS = [
    ("tcp://127.0.0.1:1 tls://127.0.0.1:1", True),
    ("tcp://0.0.0.0:1 tcp://127.0.0.1:1", True),
    ("tcp://a:1 tcp://a:1", True),
    ("unix:/g unix:/g?mode=0600", True),
    # With both, `::` has IPv6 alone.
    ("tcp://0.0.0.0:1 tcp://[::]:1", False),
    ("tcp://127.0.0.1:1 tcp://[::]:1", False),
    ("tcp://127.0.0.1:1 tcp://127.0.0.1:2 tcp://127.0.0.2:1 unix:/g unix:/h", False),
    ("tcp://127.0.0.1:0 tcp://127.0.0.1:0", False),
]


@pytest.mark.parametrize(("bind", "collides"), COLLISIONS)
def test_two_ways_in_cannot_have_one_address(bind: str, *, collides: bool) -> None:
    assert bool(Config(bind=bind).port_collision) is collides


def test_a_way_in_cannot_have_the_admin_port() -> None:
    config = Config(bind="unix:/g tcp://0.0.0.0:4243", admin_port=4243)
    assert config.port_collision == (
        "--bind and --admin-port are both 4243, on 0.0.0.0 and 127.0.0.1:"
        " choose another port for one of them"
    )


@pytest.mark.parametrize(
    ("bind", "cert", "reason"),
    [
        ("tls://a:1", "", "--bind tls://... needs --tls-cert"),
        (
            "tcp://a:1 unix:/g",
            "c.pem",
            "--tls-cert needs a way in with TLS: --bind tls://HOST:PORT",
        ),
        ("tcp://a:1 tls://a:2", "c.pem", ""),
    ],
)
def test_tls_needs_a_certificate_and_the_other_way_round(bind: str, cert: str, reason: str) -> None:
    assert Config(bind=bind, tls_cert=cert).contradiction == reason


def test_without_bind_there_is_one_way_in() -> None:
    assert Config(host="::", port=1).ways == (Way(TCP, "::", 1),)
    assert Config(tls_cert="c.pem").ways == (Way(TLS, "127.0.0.1", 4242),)


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
    assert peer(name) == address
