"""The client of the admin port: its deadlines, and any response that it may get."""

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
    CLOSED,
    SLOW,
    STRANGE,
    TIMEOUT_SECONDS,
    Target,
    as_json,
    parse_targets,
    poll,
    poll_twice,
)
from gserver.cli.top import line, render
from gserver.config import Config
from gserver.errors import UsageError
from gserver.scoreboard import Scoreboard
from lab.running import PATIENCE, Running, argv, gserver, until

MEMBER = {"id": "a", "clients": 1, "silent_seconds": 0.1, "is_late": False}
MEMBERS = {"servers": [MEMBER], "omitted_servers": 0, "age_seconds": 0.1, "error_kind": None}
#: A valid status; `WORKER` is one of its workers.
GOOD: dict[str, Any] = describe(
    Config(server_id="here", redis_url="redis://x"), Scoreboard.create(1), MEMBERS
)
WORKER = {"slot": 0, "pid": 7, "age_seconds": 1.0, "silent_seconds": 0.1, "clients": 0, "reads": 0}
GOOD["workers"]["each"] = [WORKER]
GOOD["commands"]["WHO"] = 3
HEAD = b"HTTP/1.0 200 OK\r\n\r\n"


@contextmanager
def answering(*parts: bytes, pause: float = 0.0) -> Iterator[tuple[str, list[bytes]]]:
    """A server that sends these parts to each client, with a pause between them.

    Yields its address and the bytes that it has read.
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


def seen(body: bytes, head: bytes = HEAD) -> Target:
    """The target after a server has sent this response."""
    with answering(head, body) as (address, _):
        [target] = parse_targets([address], "")
        poll([target])
        return target


def test_a_valid_status_is_accepted() -> None:
    target = seen(json.dumps(GOOD).encode())
    assert (target.error, target.now, target.verdict) == ("", GOOD, GOOD["verdict"])
    assert json.loads(as_json([target])) == {target.address: GOOD}
    alone = {**GOOD, "cluster": None, "news": ["of a later version"]}
    assert seen(json.dumps(alone).encode()).now == alone
    unknown = describe(Config(redis_url="redis://x"), Scoreboard.create(1), None)
    assert seen(json.dumps(unknown).encode()).error == ""


def changed(path: str, value: Any) -> bytes:
    """A status with one changed value."""
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
    """The path of each part of a value."""
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield f"{path}{name}"
        if isinstance(item, dict | list):
            yield from paths(item, f"{path}{name}.")


#: Parts of a status that are not shown.
UNSEEN = {
    *argv("version limit accepted closed lost reads slot events rejected"),
    *argv("last_second log_lines_dropped latency_bounds_seconds p50_seconds p99_seconds"),
    *argv(
        "wanted worker_restarts agent_starts reloads reload_failures is_held"
        " heartbeats heartbeat_seconds heartbeat_errors is_this admin_url"
    ),
}
MANY = dict.fromkeys(map(str, range(2000)), 0)
WRONG: list[Any] = [
    {"x" * 200: 0},
    "x" * 2_000,
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
    and not path.startswith("cluster.engines")
    and path not in ("workers.now", "server.now")
    and not path.startswith(
        ("cluster.heartbeat_errors", "latency_bounds_seconds", "events", "processes")
    )
    and not path.startswith("clients.by_transport")
]


@pytest.mark.parametrize("path", SEEN)
def test_a_status_with_a_value_of_another_type_is_rejected(path: str) -> None:
    for wrong in WRONG:
        assert seen(changed(path, wrong)).error == STRANGE, wrong


@pytest.mark.parametrize("path", SEEN)
def test_a_status_with_a_missing_value_is_rejected(path: str) -> None:
    way, _, last = path.rpartition(".")
    is_optional = last.isdigit() or way in ("commands", "error_replies", "command_seconds")
    trouble = "" if is_optional else STRANGE
    assert seen(changed(path, ...)).error == trouble


def test_every_accepted_status_can_be_shown() -> None:
    for path in SEEN:
        values: list[Any] = [None, True, 0, -1.5, 2**62, "x", "[/red]", {}, []]
        for value in values:
            target = seen(changed(path, value))
            line(target)
            Console(file=io.StringIO(), width=80).print(render([target]))


@pytest.mark.parametrize(
    ("answer", "trouble"),
    [
        (b"", CLOSED),
        (b"SSH-2.0-OpenSSH_9.2\r\n", STRANGE),
        (b"\x1b]0;P\x07 200 foo\r\n\r\n", STRANGE),
        (b"HTTP/1.0 99x OK\r\n\r\n", STRANGE),
        (b"HTTP/1.0 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n{}", STRANGE),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}", STRANGE),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", STRANGE),
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
def test_a_response_of_another_service_is_reported_in_one_line(answer: bytes, trouble: str) -> None:
    assert seen(answer, head=b"").error == trouble


def test_headers_are_accepted_up_to_a_limit() -> None:
    for count, trouble in ((90, ""), (200, STRANGE)):
        head = b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * count + b"\r\n"
        assert seen(json.dumps(GOOD).encode(), head).error == trouble


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_with_a_length_or_in_chunks_is_read(framing: str) -> None:
    body = json.dumps(GOOD).encode()
    if framing == "length":
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    else:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    assert seen(body, head).now == GOOD


def test_terminal_sequences_are_removed_from_texts() -> None:
    foul = "\x1b]0;P\x07\x1b[2J\x9b\x7f\u202e\ud800é\n"
    target = seen(changed("server.id", foul).replace(b'"WHO"', json.dumps(foul).encode()))
    plain = r"\x1b]0;P\x07\x1b[2J\x9b\x7f\u202e\ud800\xe9\n"
    assert target.now["server"]["id"] == plain
    assert plain in target.now["commands"]
    target = seen(changed("cluster.members.servers.0.id", foul))
    assert target.now["cluster"]["members"]["servers"][0]["id"] == plain


def test_a_token_is_sent_only_to_the_named_server() -> None:
    token = "täglich \n neu"
    with answering(b"") as (elsewhere, stolen):
        location = f"HTTP/1.0 302 Found\r\nLocation: http://{elsewhere}/\r\n\r\n".encode()
        with answering(location) as (address, asked):
            poll(parse_targets([address], token))
    header = next(
        part for part in asked[0].decode().split("\r\n") if part.startswith("Authorization: Basic ")
    )
    assert base64.b64decode(header.split()[2]).decode() == f":{token}"
    assert stolen == []


@pytest.mark.parametrize(
    ("parts", "pause"),
    [
        ([HEAD, *[b" "] * 100], 0.1),
        ([HEAD, b" ", b" "], 1.5),
        ([b"H", b"T", b"T", b"P", *[b"/"] * 100], 0.1),
        ([b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 90], 0.1),
        ([*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 100], 0.1),
        ([HEAD, *[b'"' * 10_000] * 100], 0.03),
    ],
)
def test_one_deadline_covers_the_whole_response(parts: list[bytes], pause: float) -> None:
    with answering(*parts, pause=pause) as (address, asked):
        targets, began = parse_targets([address], ""), time.monotonic()
        poll(targets)
        assert TIMEOUT_SECONDS <= time.monotonic() - began < TIMEOUT_SECONDS + 5 * PATIENCE
        assert targets[0].error == SLOW

        def asked_again() -> bool:
            poll(targets, 0.1)
            return len(asked) == 2

        until(asked_again, "the late request has ended", 2 * PATIENCE)


def test_an_endless_response_is_abandoned_before_the_deadline() -> None:
    with answering(HEAD, b" " * 10_000_000) as (address, _):
        targets, began = parse_targets([address], ""), time.monotonic()
        poll(targets)
        assert targets[0].error == STRANGE
        assert time.monotonic() - began < TIMEOUT_SECONDS


def test_a_slow_server_delays_no_other_and_is_shown_when_it_responds() -> None:
    with (
        answering(HEAD, json.dumps(GOOD).encode()) as (quick, _),
        answering(HEAD, b" ", b"{}", pause=0.5) as (slow, asked),
    ):
        targets, began = parse_targets([slow, quick], ""), time.monotonic()
        poll(targets, 0.1)
        assert time.monotonic() - began < 0.1 + 0.5 * PATIENCE

        def is_quick_known() -> bool:
            poll(targets, 0.1)
            return targets[1].error == ""

        if targets[1].error:
            until(is_quick_known, "the quick one has answered")
        assert targets[0].error == "no answer yet"

        def answered() -> bool:
            poll(targets, 0.1)
            return targets[0].error == STRANGE

        until(answered, "the slow server has answered")
        assert len(asked) == 1, "it is not polled again meanwhile"


def test_only_servers_that_answered_are_polled_a_second_time() -> None:
    with ExitStack() as stack:
        good, asked = stack.enter_context(answering(HEAD, json.dumps(GOOD).encode()))
        bad, asked_in_vain = stack.enter_context(answering(b"x"))
        targets = parse_targets([good, bad], "")
        poll_twice(targets, 0.01)
        assert (len(asked), len(asked_in_vain)) == (2, 1)
        assert (targets[0].before, targets[1].error) == (GOOD, STRANGE)


def test_a_server_without_a_token_ignores_a_sent_one() -> None:
    with Running("--admin-port", "0") as server:
        server.wait_for("agent.ready")
        targets = parse_targets([f"127.0.0.1:{server.admin_port()}"], "of another server")
        poll(targets)
        assert targets[0].error == ""


@pytest.mark.parametrize(
    "url",
    [
        "",
        *argv("x http:// https://127.0.0.1:1 127.0.0.1:x 127.0.0.1:1/x 127.0.0.1:99999 [::1:4243"),
        "a b:4243",
    ],
)
def test_an_invalid_admin_address_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(UsageError, match="is not an admin port"):
        parse_targets([url], "")
    done = gserver("top", "--once", "--admin", url)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_token_in_a_wrong_address_is_not_shown() -> None:
    with pytest.raises(UsageError, match=r"'10\.0\.0\.1' is not an admin port") as caught:
        parse_targets(["http://:geheim@10.0.0.1"], "")
    assert "geheim" not in str(caught.value)


def test_an_unresolvable_name_is_reported() -> None:
    targets = parse_targets(["nowhere.invalid:1", "x" * 70 + ":1"], "")
    poll(targets)
    assert all(each.error not in ("", STRANGE) for each in targets)


def status(uptime: float, who: int = 0, server_id: str = "a") -> dict[str, object]:
    return {
        "server": {"id": server_id, "state": "ready", "uptime_seconds": uptime},
        "commands": {"WHO": who, "WHY": 1},
    }


def test_a_rate_uses_the_servers_clock_and_is_never_invented() -> None:
    target = Target("x")
    target.now = status(10, 100)
    assert target.rate("commands") is None
    target.before, target.now = target.now, status(12, 150)
    assert target.rate("commands") == target.rate("commands", "WHO") == 25
    assert target.rate("commands", "WHY") == 0
    target.before, target.now = target.now, status(1, 0, "another")
    assert target.rate("commands") is None
    target.before, target.now = status(12), status(12)
    assert target.rate("commands") is None
    target.before, target.now = status(10, 100), status(20, 50)
    assert target.rate("commands") is None, "the server has started again with the same id"
