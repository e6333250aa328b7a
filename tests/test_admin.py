"""The admin port: its responses, who may read them, and that load on it slows no client."""

import base64
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from gserver.agent.admin_port import MAX_REQUEST_BYTES, MAX_WAITING, REQUEST_SECONDS
from lab.admin import dial, get, metrics, status
from lab.running import (
    LIMIT,
    PATIENCE,
    Running,
    argv,
    error_line,
    extended,
    gserver,
    program,
    stopped,
    until,
)

TOKEN = "not-a-secret"
LARGE = "from lab.commands import replying\nlarge = replying('LARGE', 20_000_000)\n"


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    """A server with an admin port, shared by tests that do not change it."""
    with Running("--admin-port", "0", "--server-id", "here", "--max-clients", "50") as running:
        running.wait_for("agent.ready")
        yield running


def test_there_is_no_admin_port_by_default(server: Running) -> None:
    assert server.agents() == []
    assert server.events("server.listening")[0].get("gserver.admin_port") is None


def test_a_serving_server_is_alive_and_ready(here: Running) -> None:
    assert get(here, "/livez")[::2] == (200, b"alive\n")
    assert get(here, "/readyz")[::2] == (200, b"ready\n")


def test_an_unknown_path_is_not_found_and_the_known_paths_are_listed(here: Running) -> None:
    for path in ("/x", "/status", "//", "/%00", "/../etc/passwd", "/" + "x" * 2000):
        known = b"available: /, /status.json, /history.json, /clients.json, /kick"
        known += b", /metrics, /livez, /readyz\n"
        assert get(here, path)[::2] == (404, known)


def test_only_get_and_head_are_allowed(here: Running) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "x"):
        code, headers, body = get(here, "/livez", method)
        assert (code, headers["allow"]) == (405, "GET, HEAD")
        assert body == b"supported methods: GET, HEAD\n"


@pytest.mark.parametrize("path", ["/", "/livez", "/readyz", "/metrics", "/status.json", "/x"])
def test_head_has_the_status_and_headers_of_get_without_a_body(here: Running, path: str) -> None:
    request = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with dial(here) as sock, sock.makefile("rb") as answer:
        sock.sendall(request)
        head, _, body = answer.read().partition(b"\r\n\r\n")
    assert body == b""
    code, expected, _ = get(here, path)
    status_line, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert int(status_line.split()[1]) == code
    # The figures, the length and the date change between two requests.
    varies = {"date", "content-length"}
    assert headers.keys() == expected.keys()
    assert {name: headers[name] for name in headers.keys() - varies} == {
        name: expected[name] for name in expected.keys() - varies
    }
    assert int(headers["content-length"]) > 0


def test_every_response_closes_and_may_not_be_cached_or_framed(here: Running) -> None:
    for path in ("/", "/livez", "/metrics", "/status.json", "/x"):
        _, headers, body = get(here, path)
        assert (headers["connection"], headers["cache-control"]) == ("close", "no-store")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert int(headers["content-length"]) == len(body)


def test_the_status_counts_what_clients_did(here: Running) -> None:
    before = status(here)
    with ExitStack() as stack:
        clients = [stack.enter_context(here.client()) for _ in range(3)]
        assert clients[0].ask(b"WHO") == b"3"
        assert clients[1].ask(b"WHERE") == b"here"
        assert clients[2].ask(b"NOPE") == b"ERR unknown command"
        # A read is counted after its reply has been sent.
        until(lambda: status(here)["reads"] - before["reads"] == 3, "all reads are counted")
        now = status(here)
    assert now["server"]["id"] == "here"
    assert (now["server"]["state"], now["server"]["endpoints"]) == ("ready", here.endpoints())
    assert now["server"]["uptime_seconds"] > before["server"]["uptime_seconds"]
    assert (now["clients"]["now"], now["clients"]["limit"]) == (3, 50)
    assert now["clients"]["peak"] >= 3
    assert now["clients"]["accepted"] - before["clients"]["accepted"] == 3
    changed = {
        name: now["commands"][name] - before["commands"][name] for name in ("WHO", "WHERE", "WHY")
    }
    assert changed == {"WHO": 1, "WHERE": 1, "WHY": 0}
    assert now["error_replies"]["unknown_command"] - before["error_replies"]["unknown_command"] == 1
    who = now["command_seconds"]["WHO"]
    assert who["count"] - before["command_seconds"]["WHO"]["count"] == 1
    assert 0 < who["seconds"] - before["command_seconds"]["WHO"]["seconds"] < 1
    assert 0 < who["p50_seconds"] <= who["p99_seconds"] < 1
    [worker] = now["workers"]["each"]
    assert (worker["pid"], worker["clients"]) == (here.workers()[0].pid, 3)
    assert 0 <= worker["silent_seconds"] < PATIENCE
    assert now["cluster"] is None


def test_the_metrics_have_the_same_figures_in_prometheus_format(here: Running) -> None:
    before, timed = metrics(here), 'gserver_command_seconds_count{command="WHY"}'
    with here.client() as client:
        assert client.ask(b"WHY") == b"42"
        until(lambda: metrics(here)[timed] > before[timed], "the command is timed")
        now = metrics(here)
        assert now["gserver_clients"] == 1
    assert (
        now['gserver_commands_total{command="WHY"}']
        - before['gserver_commands_total{command="WHY"}']
        == 1
    )
    assert now[timed] - before[timed] == 1
    assert now['gserver_command_seconds_bucket{command="WHY",le="+Inf"}'] == now[timed]
    assert now["gserver_clients_limit"] == 50
    assert now["gserver_ready"] == 1
    _, headers, _ = get(here, "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.outer
def test_promtool_accepts_the_metrics(here: Running) -> None:
    _, _, body = get(here, "/metrics")
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=body,
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_counters_survive_a_worker_and_the_agent() -> None:
    with Running("--admin-port", "0") as server, server.client() as client:
        server.wait_for("agent.ready")
        assert client.ask(b"WHY") == b"42"
        before = metrics(server)
        server.workers()[0].kill()
        server.wait_for("worker.ready", 2)
        server.agents()[0].kill()
        server.wait_for("agent.ready", 2)
        now = metrics(server)
        assert (
            now['gserver_commands_total{command="WHY"}']
            == before['gserver_commands_total{command="WHY"}']
            == 1
        )
        assert now["gserver_clients_lost_total"] == 1
        assert now["gserver_worker_restarts_total"] == 1
        assert [worker["pid"] for worker in status(server)["workers"]["each"]] == [
            server.workers()[0].pid
        ]


def test_a_server_without_workers_is_alive_but_not_ready(tmp_path: Path) -> None:
    with extended(tmp_path, LARGE, "--admin-port", "0") as server:
        server.wait_for("agent.ready")
        assert get(server, "/readyz")[0] == 200
        (tmp_path / "extra.py").write_text("raise RuntimeError('half a deploy')")
        server.workers()[0].kill()
        until(lambda: get(server, "/readyz")[0] == 503, "the server is not ready")
        assert get(server, "/livez")[0] == 200
        (tmp_path / "extra.py").write_text(LARGE)
        until(lambda: get(server, "/readyz")[0] == 200, "the server is ready again")


def test_a_server_whose_supervisor_hangs_is_not_alive() -> None:
    with Running(*argv("--admin-port 0 --hang-timeout 1")) as server, server.client() as client:
        server.wait_for("agent.ready")
        assert client.who() == 1
        with stopped(psutil.Process(server.pid)):
            server.workers()[0].kill()
            until(lambda: get(server, "/livez")[0] == 503, "the supervisor counts as hung")
            assert get(server, "/livez")[2] == b"the supervisor hangs\n"
            document = status(server)
            assert "supervisor_silent" in [reason["name"] for reason in document["reasons"]]
            assert document["clients"]["now"] == 1
        until(lambda: get(server, "/livez")[0] == 200, "the supervisor runs again")
        until(lambda: status(server)["clients"]["now"] == 0, "the dead worker's client is gone")


def test_with_a_token_every_path_except_health_needs_it() -> None:
    basic = "Basic " + base64.b64encode(f"x:{TOKEN}".encode()).decode()
    good = (f"Bearer {TOKEN}", f"bearer {TOKEN}", basic)
    bad = (
        "",
        "Bearer",
        "Bearer x",
        f"Basic {TOKEN}",
        "Basic !",
        "Basic \xff",
        "Basic /w==",
        f"Digest {TOKEN}",
    )
    with Running("--admin-port", "0", env={"GSERVER_ADMIN_TOKEN": TOKEN}) as server:
        server.wait_for("agent.ready")
        for path in ("/", "/status.json", "/metrics"):
            code, headers, body = get(server, path)
            assert (code, headers["www-authenticate"].partition(" ")[0]) == (401, "Basic")
            assert TOKEN.encode() not in body
            for right in good:
                assert get(server, path, Authorization=right)[0] == 200
            for wrong in (*bad, *(f"{right}x" for right in good)):
                assert get(server, path, Authorization=wrong)[0] == 401, wrong
        assert get(server, "/livez")[0] == get(server, "/readyz")[0] == 200
        assert TOKEN not in "".join(server.lines)
        assert not server.events("process.error")


@pytest.mark.parametrize("token", ["s3cret ", " s3cret", " "])
def test_a_token_that_http_cannot_carry_is_refused_at_start(token: str) -> None:
    for arguments, env in ((["--admin-token", token], {}), ([], {"GSERVER_ADMIN_TOKEN": token})):
        done = gserver("--port", "0", "--admin-port", "0", *arguments, **env)
        assert "the token begins or ends with a blank, which HTTP removes" in error_line(done)
        assert "s3cret" not in done.stderr


def test_a_token_with_a_blank_inside_is_accepted() -> None:
    with Running("--admin-port", "0", env={"GSERVER_ADMIN_TOKEN": "two words"}) as server:
        server.wait_for("agent.ready")
        assert get(server, "/metrics", Authorization="Bearer two words")[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.com"])
def test_an_address_beyond_loopback_needs_a_token(host: str) -> None:
    done = gserver("--admin-port", "0", "--admin-host", host)
    reason = f"--admin-host {host} is not loopback: set --admin-token, too"
    assert error_line(done) == reason


def test_a_request_with_a_foreign_host_name_is_refused(here: Running) -> None:
    evil = argv(
        "evil.example evil.example:80 127.0.0.1.evil.example [::1].evil.example [::1]evil:80"
    )
    for name in (*evil, "[localhost]", "", "[", "]", "[]", "localhost.evil", "localhost:80.evil"):
        assert get(here, "/status.json", Host=name)[0] in (400, 403), name
    for name in argv("127.0.0.1 localhost:1 LOCALHOST LocalHost:80 [::1] [::1]:80 127.8.8.8"):
        assert get(here, "/status.json", Host=name)[0] == 200, name


def test_without_a_token_a_sent_token_is_ignored_and_the_host_is_checked(here: Running) -> None:
    for value in (f"Bearer {TOKEN}", "Basic !", ""):
        assert get(here, "/status.json", Authorization=value)[0] == 200
        assert get(here, "/status.json", Authorization=value, Host="evil.example")[0] == 403


def test_a_busy_admin_port_is_reported_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = gserver("--port", "0", "--admin-port", str(port))
    reason = "it is in use by another program: stop that one, or choose another --admin-port"
    assert error_line(done, 1) == f"cannot listen on 127.0.0.1:{port}: {reason}"


@pytest.mark.outer
def test_connections_are_answered_while_the_agent_is_replaced() -> None:
    with Running("--admin-port", "0") as server, ExitStack() as stack:
        is_over, counts = threading.Event(), [0] * 4

        def ask(number: int) -> None:
            while not is_over.is_set():
                with dial(server) as sock:
                    time.sleep(0.02)
                    sock.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    assert sock.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
                counts[number] += 1

        pool = stack.enter_context(ThreadPoolExecutor(4))
        stack.callback(is_over.set)
        asking = [pool.submit(ask, number) for number in range(4)]
        for number in range(3):
            until(
                lambda: all(counts) or any(each.done() for each in asking),
                "all requests are answered",
            )
            counts[:] = [0] * 4
            server.send_signal(signal.SIGHUP)
            server.wait_for("agent.ready", number + 2)
        is_over.set()
        for each in asking:
            each.result()


@pytest.mark.outer
def test_an_unfinished_request_does_not_delay_the_next_agent() -> None:
    with Running("--admin-port", "0") as server, dial(server) as silent:
        silent.sendall(b"GET /re")
        until(lambda: get(server, "/livez")[0] == 200, "the earlier connection has been accepted")
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        began = time.monotonic()
        server.wait_for("agent.ready", 2)
        assert time.monotonic() - began < REQUEST_SECONDS
        assert server.stop() == 0
        assert server.stderr == ""
        assert [
            event for event in server.events() if event["log.level"] in ("error", "warning")
        ] == []


# Hostile requests.


UNFINISHED = (
    b"",
    b"GET /",
    b"GET /livez HTTP/1.1\r\n",
    b"GET /livez HTTP/1.1\r\nX: y\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 99\r\n\r\nx",
    b"\0" * 1000,
)


@pytest.mark.outer
def test_unfinished_requests_are_closed_in_time_and_block_no_others(here: Running) -> None:
    began = time.monotonic()
    with ExitStack() as stack:
        socks = [stack.enter_context(dial(here)) for _ in UNFINISHED]
        for sock, sent in zip(socks, UNFINISHED, strict=True):
            sock.sendall(sent)
        assert get(here, "/livez")[0] == 200
        for sock, sent in zip(socks, UNFINISHED, strict=True):
            while sock.recv(65536):
                pass
            assert 4 < time.monotonic() - began < 5 + LIMIT, sent
    assert get(here, "/livez")[0] == 200


def test_an_incomplete_request_is_not_taken_for_a_shorter_one(here: Running) -> None:
    head = b"GET /status.json HTTP/1.1\r\nHost: localhost"
    padding = b"GET /status.json HTTP/1.1\r\nX: %s\r\nHost: localhost"
    padding %= b"x" * (MAX_REQUEST_BYTES - len(padding % b""))
    for sent in (head, head + b"\r\n", padding + b".evil.example\r\n\r\n"):
        with dial(here) as sock, sock.makefile("rb") as answer:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            assert answer.readline() == b"HTTP/1.1 400 Bad Request\r\n"
    with dial(here) as sock, sock.makefile("rb") as answer:
        sock.sendall(head + b"\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert answer.readline() == b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("sent", "status_line"),
    [
        (b"x" * 100_000, b"HTTP/1.1 414 Request URI Too Long\r\n"),
        (b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 200, b"HTTP/1.1 400 Bad Request\r\n"),
        (b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 9**6, b"HTTP/1.1 400 Bad Request\r\n"),
        (b"\r\n" * 50_000, b"HTTP/1.1 400 Bad Request\r\n"),
    ],
    ids=["line", "headers", "megabytes of headers", "blank lines"],
)
def test_a_request_that_is_too_large_is_refused_before_its_end(
    here: Running, sent: bytes, status_line: bytes
) -> None:
    [agent] = here.agents()
    before = agent.memory_info().rss
    with dial(here) as sock, sock.makefile("rb") as answer:
        with suppress(ConnectionError):  # The server may close it first.
            sock.sendall(sent)
        assert answer.readline() == status_line
    assert get(here, "/livez")[0] == 200
    assert here.agents() == [agent]
    assert agent.memory_info().rss - before < 4_000_000
    assert_no_trace(here)


def assert_no_trace(server: Running) -> None:
    """Nothing was logged above the level `debug`, and nothing was printed."""
    assert not server.events("process.error")
    assert not server.stderr


@pytest.mark.parametrize(
    "sent",
    [
        *(
            b"GET / HTTP/" + version + b"\r\n\r\n"
            for version in (b"", b"1", b"1.", b"x", b"1.x", b"1.-1", b"2.0", b"\xb2.0")
        ),
        *(
            b"GET /livez HTTP/1.1\r\nContent-Length: " + size + b"\r\n\r\n"
            for size in (b"x", b"-1", b"9" * 5000)
        ),
        *(
            b"GET /livez HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + b"\r\n\r\n"
            for chunk in (b"", b";x", b"x", b"-1", b"0", b"f" * 17)
        ),
    ],
)
def test_a_malformed_request_is_refused_and_not_logged(here: Running, sent: bytes) -> None:
    with dial(here) as sock, sock.makefile("rb") as answer:
        sock.sendall(sent)
        assert answer.readline() == b"HTTP/1.1 400 Bad Request\r\n"
    assert_no_trace(here)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /",
        b"GET /livez HTTP/1.1\r\nX: y",
        b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx",
    ],
)
def test_an_aborted_request_is_not_logged(here: Running, sent: bytes) -> None:
    for _ in range(10):
        with dial(here) as sock:
            sock.sendall(sent)
            assert get(here, "/livez")[0] == 200  # The aborted request has been read.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert get(here, "/livez")[0] == 200
    assert_no_trace(here)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /livez HTTP/1.1\r\nX: y", b"POST / HTTP/1.1\r\nContent-Length: 99\r\n\r\nx"]
)
def test_many_unfinished_requests_delay_neither_clients_nor_the_admin_port(
    here: Running, sent: bytes
) -> None:
    with ExitStack() as stack:
        crowd = []
        for _ in range(90):
            crowd.append(stack.enter_context(dial(here)))
            crowd[-1].sendall(sent)
        began = time.monotonic()
        for _ in range(5):
            assert (
                get(here, "/livez")[0] == get(here, "/readyz")[0] == get(here, "/metrics")[0] == 200
            )
        with here.client() as client:
            for _ in range(100):
                assert client.ask(b"WHY") == b"42"
        assert time.monotonic() - began < 10 * PATIENCE
        still = [sock for sock in crowd if not select.select([sock], [], [], 0)[0]]
        assert len(still) == (0 if sent.startswith(b"POST") else MAX_WAITING - 1), (
            "the newest connections stay open"
        )
        assert still == crowd[len(crowd) - len(still) :]
    assert_no_trace(here)
    assert not here.events("agent.died")


def test_no_connection_is_evicted_while_its_response_is_prepared() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:
        # Each response waits briefly for this Redis, which never replies.
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        server = stack.enter_context(Running("--admin-port", "0", "--redis-url", url))
        server.wait_for("agent.ready")
        crowd = []
        for _ in range(2 * MAX_WAITING - 4):
            crowd.append(stack.enter_context(dial(server)))
            crowd[-1].sendall(b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert [sock.recv(12) for sock in crowd] == [b"HTTP/1.1 200"] * len(crowd)


@pytest.mark.outer
def test_time_spent_waiting_for_a_slow_reader_is_not_that_of_the_command(tmp_path: Path) -> None:
    with extended(tmp_path, LARGE, "--admin-port", "0") as server, server.client() as client:
        server.wait_for("agent.ready")
        client.send(b"LARGE\n")
        client.sock.recv(1)
        time.sleep(4.0)  # The client does not read.
        assert len(client.line()) == 20_000_000
        until(lambda: status(server)["reads"] == 1, "the read is counted")
        assert status(server)["command_seconds"]["LARGE"]["seconds"] < 3.5
