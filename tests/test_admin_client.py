"""Who asks admin ports: in time, and whatever answers there."""

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from gserver.agent.status import status as describe
from gserver.cli.admin_client import (
    SLOW,
    STRANGE,
    TIMEOUT_SECONDS,
    Watched,
    look,
    look_twice,
    told,
    watch,
)
from gserver.cli.screens import line, screens
from gserver.config import Config
from gserver.errors import UsageError
from gserver.scoreboard import Scoreboard
from tests.running import PATIENCE, Running, gserver, until

MEMBER = {"id": "a", "clients": 1, "silent_seconds": 0.1, "is_late": False, "is_this": True}
ROSTER = {"servers": [MEMBER], "left_out": 0, "age_seconds": 0.1, "trouble": None}
#: What a server says; `WORKER` is one of its workers.
GOOD: dict[str, Any] = describe(
    Config(server_id="here", redis_url="redis://x"), Scoreboard.create(1), ROSTER
)
WORKER = {"slot": 0, "pid": 7, "age_seconds": 1.0, "silent_seconds": 0.1, "clients": 0, "reads": 0}
GOOD["workers"]["each"] = [WORKER]
GOOD["commands"]["WHO"] = 3
HEAD = b"HTTP/1.0 200 OK\r\n\r\n"


@contextmanager
def answering(*parts: bytes, pause: float = 0.0) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers anybody with these parts, so many seconds between; its address, and
    what it has read.
    """
    asked: list[bytes] = []

    def answer(sock: socket.socket) -> None:
        with sock:
            asked.append(sock.recv(65536))
            for part in parts:
                try:
                    sock.sendall(part)
                except OSError:
                    return
                time.sleep(pause)

    def serve() -> None:
        while True:
            try:
                sock = listener.accept()[0]
            except OSError:
                return
            Thread(target=answer, args=(sock,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=serve, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", asked
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def seen(body: bytes, head: bytes = HEAD) -> Watched:
    """What is seen of a server that answers so."""
    with answering(head, body) as (address, _):
        [watched] = watch([address], "")
        look([watched])
        return watched


def test_what_a_server_says_is_believed_as_it_is() -> None:
    watched = seen(json.dumps(GOOD).encode())
    assert (watched.trouble, watched.now, watched.state) == ("", GOOD, GOOD["server"]["state"])
    assert told([watched]) == {watched.address: GOOD}
    alone = {**GOOD, "cluster": None, "news": ["of a later version"]}
    assert seen(json.dumps(alone).encode()).now == alone
    unknown = describe(Config(redis_url="redis://x"), Scoreboard.create(1), None)
    assert seen(json.dumps(unknown).encode()).trouble == ""


def changed(path: str, value: Any) -> bytes:
    """What a server says, with one thing that is different."""
    status = deepcopy(GOOD)
    *way, last = (int(name) if name.isdigit() else name for name in path.split("."))
    place: Any = status
    for name in way:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(status).encode()


def paths(value: Any, path: str = "") -> Iterator[str]:
    """The place of everything in a value."""
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield f"{path}{name}"
        if isinstance(item, dict | list):
            yield from paths(item, f"{path}{name}.")


#: What is in a status that is not shown.
UNSEEN = {
    *(
        "version",
        "host",
        "port",
        "limit",
        "accepted",
        "closed",
        "lost",
        "service_seconds",
        "reads",
        "slot",
    ),
    *(
        "wanted",
        "worker_restarts",
        "agent_starts",
        "reloads",
        "reload_failures",
        "is_held",
        "heartbeats",
        "heartbeat_seconds",
        "heartbeat_errors",
        "is_this",
    ),
}
MANY = dict.fromkeys(map(str, range(2000)), 0)
WRONG: list[Any] = [
    {"x" * 200: 0},
    "x" * 200,
    [[]],
    {"x": []},
    1e400,
    float("nan"),
    -(2**70),
    [0] * 2000,
    MANY,
]
SEEN = [
    path
    for path in paths(GOOD)
    if path.rpartition(".")[2] not in UNSEEN
    and path != "workers.now"
    and not path.startswith("cluster.heartbeat_errors")
]


@pytest.mark.parametrize("path", SEEN)
def test_with_one_thing_of_another_shape_it_is_no_status(path: str) -> None:
    for wrong in WRONG:
        assert seen(changed(path, wrong)).trouble == STRANGE, wrong


@pytest.mark.parametrize("path", SEEN)
def test_with_one_thing_missing_it_is_no_status_unless_it_is_one_of_any_number(path: str) -> None:
    way, _, last = path.rpartition(".")
    trouble = "" if last == "0" or way in ("commands", "error_replies") else STRANGE
    assert seen(changed(path, ...)).trouble == trouble


def test_whatever_fits_can_be_shown() -> None:
    for path in SEEN:
        values: list[Any] = [None, True, 0, -1.5, 2**62, "x", "[/red]", {}, []]
        for value in values:
            watched = seen(changed(path, value))
            line(watched)
            Console(file=io.StringIO(), width=80).print(screens([watched]))


@pytest.mark.parametrize(
    ("answer", "trouble"),
    [
        (b"", "it closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", STRANGE),
        (b"\x1b]0;P\x07 200 foo\r\n\r\n", STRANGE),
        (b"HTTP/1.0 99x OK\r\n\r\n", STRANGE),
        (HEAD + json.dumps(GOOD).encode()[:-1], STRANGE),
        (HEAD + b"\xff\xfe", STRANGE),
        (HEAD + b"[" * 200_000, STRANGE),
        (HEAD + b"[" * 700 + b"]" * 700, STRANGE),
        (HEAD + b'{"server": ' + b"1" * 10_000 + b"}", STRANGE),
        (HEAD + b" " * 1_000_000 + json.dumps(GOOD).encode(), STRANGE),
        (b"HTTP/1.1 401 Unauthorized\r\n\r\n", "the admin token is missing or wrong"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "HTTP 302"),
    ],
)
def test_what_is_no_admin_port_is_said_in_a_line(answer: bytes, trouble: str) -> None:
    assert seen(answer, head=b"").trouble == trouble


def test_many_headers_are_no_trouble() -> None:
    assert (
        seen(json.dumps(GOOD).encode(), b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n").now
        == GOOD
    )


def test_nothing_that_a_terminal_would_obey_is_left_in_texts() -> None:
    foul = "\x1b]0;P\x07\x1b[2J\x9b\x7f\u202e\ud800é\n"
    watched = seen(changed("server.id", foul).replace(b'"WHO"', json.dumps(foul).encode()))
    plain = r"\x1b]0;P\x07\x1b[2J\x9b\x7f\u202e\ud800\xe9\n"
    assert watched.now["server"]["id"] == plain
    assert plain in watched.now["commands"]
    watched = seen(changed("cluster.roster.servers.0.id", foul))
    assert watched.now["cluster"]["roster"]["servers"][0]["id"] == plain


def test_a_token_goes_to_the_server_that_is_asked_and_nowhere_else() -> None:
    token = "täglich \n neu"
    with answering(b"") as (elsewhere, stolen):
        location = f"HTTP/1.0 302 Found\r\nLocation: http://{elsewhere}/\r\n\r\n".encode()
        with answering(location) as (address, asked):
            look(watch([address], token))
    header = next(
        part for part in asked[0].decode().split("\r\n") if part.startswith("Authorization: Basic ")
    )
    assert base64.b64decode(header.split()[2]).decode() == f":{token}"
    assert stolen == []


def test_one_deadline_holds_for_all_of_an_answer() -> None:
    with ExitStack() as stack:
        dripping, asked = stack.enter_context(answering(HEAD, *[b" "] * 100, pause=0.1))
        halting, _ = stack.enter_context(answering(HEAD, b" ", b" ", pause=1.5))
        watched, began = watch([dripping, halting], ""), time.monotonic()
        look(watched)
        assert TIMEOUT_SECONDS <= time.monotonic() - began < TIMEOUT_SECONDS + PATIENCE
        assert [each.trouble for each in watched] == [SLOW, SLOW]

        def asked_again() -> bool:
            look(watched, 0.1)
            return len(asked) == 2

        until(asked_again, "who has dripped for too long is done with", 2 * PATIENCE)


def test_who_is_slow_keeps_nobody_from_being_seen_and_is_heard_when_it_answers() -> None:
    with (
        answering(HEAD, json.dumps(GOOD).encode()) as (quick, _),
        answering(HEAD, b" ", b"{}", pause=0.5) as (slow, asked),
    ):
        watched, began = watch([slow, quick], ""), time.monotonic()
        look(watched, 0.1)
        assert time.monotonic() - began < 0.1 + 0.5 * PATIENCE
        assert [each.trouble for each in watched] == ["no answer yet", ""]

        def answered() -> bool:
            look(watched, 0.1)
            return watched[0].trouble == STRANGE

        until(answered, "it is heard")
        assert len(asked) == 1, "it was not asked again meanwhile"


def test_a_second_look_is_at_those_that_have_answered_the_first() -> None:
    with ExitStack() as stack:
        good, asked = stack.enter_context(answering(HEAD, json.dumps(GOOD).encode()))
        bad, asked_in_vain = stack.enter_context(answering(b"x"))
        watched = watch([good, bad], "")
        look_twice(watched, 0.01)
        assert (len(asked), len(asked_in_vain)) == (2, 1)
        assert (watched[0].before, watched[1].trouble) == (GOOD, STRANGE)


def test_a_server_without_a_token_ignores_one() -> None:
    with Running("--admin-port", "0") as server:
        server.wait_for("agent.ready")
        watched = watch([f"127.0.0.1:{server.admin_port()}"], "of another server")
        look(watched)
        assert watched[0].trouble == ""


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "http://",
        "https://127.0.0.1:1",
        "127.0.0.1:x",
        "127.0.0.1:1/x",
        "127.0.0.1:99999",
        "[::1:4243",
    ],
)
def test_what_is_no_admin_port_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(UsageError, match="is no admin port"):
        watch([url], "")
    done = gserver("top", "--once", "--admin", url)
    assert done.returncode == 2 or url == ""
    assert len(done.stderr.splitlines()) <= 1


def test_a_name_that_is_none_is_trouble() -> None:
    watched = watch(["nowhere.invalid:1", "x" * 70 + ":1"], "")
    look(watched)
    assert all(each.trouble not in ("", STRANGE) for each in watched)


def status(uptime: float, who: int = 0, server_id: str = "a") -> dict[str, object]:
    return {
        "server": {"id": server_id, "state": "ready", "uptime_seconds": uptime},
        "commands": {"WHO": who, "WHY": 1},
    }


def test_a_rate_is_by_the_servers_own_clock_and_none_is_made_up() -> None:
    watched = Watched("x")
    watched.now = status(10, 100)
    assert watched.rate("commands") is None
    watched.before, watched.now = watched.now, status(12, 150)
    assert watched.rate("commands") == watched.rate("commands", "WHO") == 25
    assert watched.rate("commands", "WHY") == 0
    watched.before, watched.now = watched.now, status(1, 0, "another")
    assert watched.rate("commands") is None
    watched.before, watched.now = status(12), status(12)
    assert watched.rate("commands") is None
