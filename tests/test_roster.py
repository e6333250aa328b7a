"""Who is connected: `gserver clients` and `kick`, and the paths of the admin port."""

import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gserver.agent.roster import ANSWER_SECONDS, SORTS, Roster
from gserver.scoreboard import Scoreboard
from lab.admin import status
from lab.certificates import make_certificates
from lab.running import LIMIT, Client, Event, Running, argv, extended, gserver, until
from lab.tls_client import certified, trust

MODULE = """
import time
from lab.commands import napping, replying
nap = napping("NAP", 60)
large = replying("LARGE", 5_000_000)

from gserver.commands import command

@command("FROM")
def from_(request):
    return request.address
"""


def admin(server: Running) -> str:
    return f"127.0.0.1:{server.admin_port()}"


def listed(server: Running, *options: str) -> dict[str, Any]:
    """What `gserver clients --json` prints."""
    done = gserver("clients", "--json", "--admin", admin(server), *options)
    document: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0 if document["is_complete"] else 1, "")
    return document


def of(document: dict[str, Any], client: Client) -> dict[str, Any]:
    """The entry of a client."""
    port = client.sock.getsockname()[1]
    [found] = [each for each in document["clients"] if each["port"] == port]
    return dict(found)


def test_each_client_is_listed_with_its_state(tmp_path: Path) -> None:
    options = argv("--workers 2 --admin-port 0 --unterminated-after 0 --write-timeout 0")
    with extended(tmp_path, MODULE, *options) as server, ExitStack() as stack:
        server.wait_for("agent.ready")
        idle, reading, busy, blocked = (stack.enter_context(server.client()) for _ in range(4))
        until(lambda: idle.who() == 4, "all are counted")
        reading.send(b"WHY\nWH")
        assert reading.line() == b"42\n"
        busy.send(b"NAP\n")
        blocked.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        blocked.send(b"LARGE\n")

        def states() -> list[tuple[str, str | None]]:
            document = listed(server)
            each = [of(document, client) for client in (idle, reading, busy, blocked)]
            return [(one["state"], one["command"]) for one in each]

        expected = [("idle", None), ("reading", None), ("busy", "NAP"), ("blocked", None)]
        until(lambda: states() == expected, "each state is shown")
        document = listed(server)
        assert len(document["clients"]) == document["total"] == 4
        assert document["is_complete"]
        assert document["by_address"] == [{"address": "127.0.0.1", "clients": 4}]
        entry = of(document, idle)
        assert entry["address"] == "127.0.0.1"
        assert entry["worker"] in {worker.pid for worker in server.workers()}
        assert 0 < entry["idle_seconds"] <= entry["age_seconds"] < LIMIT
        assert len({each["id"] for each in document["clients"]}) == 4
        ages = [each["age_seconds"] for each in document["clients"]]
        assert ages == sorted(ages, reverse=True)
        workers = [each["worker"] for each in listed(server, "--sort", "worker")["clients"]]
        assert workers == sorted(workers)


def test_the_help_names_every_order_of_the_list() -> None:
    assert f"--sort [{'|'.join(SORTS)}]" in gserver("clients", "--help").stdout


def test_an_id_stays_over_a_reload(tmp_path: Path) -> None:
    with Running("--admin-port", "0") as server, server.client() as client:
        server.wait_for("agent.ready")
        client.who()
        before = of(listed(server), client)
        server.send_signal(signal.SIGHUP)
        server.wait_for("agent.ready", 2)
        after = of(listed(server), client)
        assert after["id"] == before["id"]
        assert after["worker"] != before["worker"]
        assert after["age_seconds"] > before["age_seconds"]


def test_a_client_can_be_closed_by_its_id_and_all_by_their_address() -> None:
    with Running("--admin-port", "0", "--workers", "2") as server, ExitStack() as stack:
        server.wait_for("agent.ready")
        others = [stack.enter_context(server.client(source="127.0.0.9")) for _ in range(3)]
        one, two = (stack.enter_context(server.client()) for _ in range(2))
        until(lambda: one.who() == 5, "all are counted")
        done = gserver("kick", of(listed(server), one)["id"], "--admin", admin(server))
        assert (done.returncode, done.stdout) == (0, "closed 1 client\n")
        assert one.rest() == b"ERR closed by the operator\n"
        done = gserver("kick", "127.0.0.9", "--admin", admin(server))
        assert (done.returncode, done.stdout) == (0, "closed 3 clients\n")
        assert {other.rest() for other in others} == {b"ERR closed by the operator\n"}
        assert two.who() == 1
        done = gserver("kick", "127.0.0.9", "--admin", admin(server))
        assert (done.returncode, done.stdout) == (1, "closed 0 clients\n")

        def kicked() -> list[Event]:
            return server.events("client.kicked")

        until(lambda: sum(event["gserver.clients"] for event in kicked()) == 4, "all are logged")
        assert {event["client.address"] for event in kicked()} == {"127.0.0.1", "127.0.0.9"}
        assert status(server)["error_replies"]["kicked"] == 4
        assert [end["reason"] for end in listed(server)["recent"]] == ["kicked"] * 4


def test_a_client_in_a_handler_is_closed_at_once(tmp_path: Path) -> None:
    with extended(tmp_path, MODULE, "--admin-port", "0") as server, server.client() as client:
        server.wait_for("agent.ready")
        client.send(b"NAP\n")
        until(lambda: of(listed(server), client)["state"] == "busy", "the handler runs")
        assert gserver("kick", "127.0.0.1", "--admin", admin(server)).returncode == 0
        assert client.rest() == b""
        assert listed(server)["total"] == 0


def test_the_last_clients_that_were_turned_away_are_listed() -> None:
    options = argv("--admin-port 0 --max-clients 1 --max-line-bytes 10")
    with Running(*options) as server:
        server.wait_for("agent.ready")
        with server.client() as client, server.client() as rejected:
            client.who()
            assert rejected.rest() == b"ERR too many clients\n"
            client.send(b"x" * 20)
            assert client.line() == b"ERR line too long\n"
        until(lambda: len(listed(server)["recent"]) == 2, "both are listed")
        last, first = listed(server)["recent"]
        assert [first["reason"], last["reason"]] == ["too_many_clients", "line_too_long"]
        assert first["address"] == "127.0.0.1"
        done = gserver("clients", "--admin", admin(server))
        assert re.search(r"\d\d:\d\d:\d\d 127\.0\.0\.1 port \d+: too_many_clients", done.stdout)


def test_the_list_for_people_says_what_it_leaves_out() -> None:
    with Running("--admin-port", "0") as server, ExitStack() as stack:
        server.wait_for("agent.ready")
        clients = [stack.enter_context(server.client()) for _ in range(5)]
        until(lambda: clients[0].who() == 5, "all are counted")
        done = gserver("clients", "--limit", "2", "--admin", admin(server))
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[0].split() == argv("id via address port worker age idle state who")
        assert [line.split()[1:3] for line in lines[1:3]] == [["tcp", "127.0.0.1"]] * 2
        assert lines[3] == f"{admin(server)}: 5 clients; 3 not shown (--limit)"
        assert lines[4] == "by address: 127.0.0.1 5"


def test_a_worker_that_hangs_leaves_its_clients_out_of_the_list() -> None:
    with Running("--admin-port", "0", "--hang-timeout", "0") as server, server.client() as client:
        server.wait_for("agent.ready")
        client.who()
        [worker] = server.workers()
        worker.suspend()
        try:
            document = listed(server)
        finally:
            worker.resume()
        assert (document["total"], document["is_complete"]) == (0, False)
        until(lambda: listed(server)["total"] == 1, "the worker answers again")


def test_a_worker_that_answers_too_late_closes_the_clients_all_the_same() -> None:
    with Running("--admin-port", "0", "--hang-timeout", "0") as server, ExitStack() as stack:
        server.wait_for("agent.ready")
        # More than it closes at once.
        clients = [stack.enter_context(server.client()) for _ in range(100)]
        until(lambda: clients[0].who() == 100, "all are counted")
        [worker] = server.workers()
        worker.suspend()
        try:
            done = gserver("kick", "127.0.0.1", "--admin", admin(server))
        finally:
            worker.resume()
        assert done.returncode == 1
        assert done.stdout.startswith("closed 0 clients; a worker has not answered")
        assert {client.rest() for client in clients} == {b"ERR closed by the operator\n"}
        assert server.wait_for("client.kicked")["gserver.clients"] == 100


def test_an_ipv4_address_is_the_same_on_an_ipv6_socket(tmp_path: Path) -> None:
    options = argv("--admin-port 0 --host :: --log-level debug")
    with extended(tmp_path, MODULE, *options) as server, server.client() as client:
        server.wait_for("agent.ready")
        assert client.ask(b"FROM") == b"127.0.0.1"
        assert of(listed(server), client)["address"] == "127.0.0.1"
        assert server.wait_for("client.accepted")["client.address"] == "127.0.0.1"
        done = gserver("kick", "::ffff:127.0.0.1", "--admin", admin(server))
        assert (done.returncode, done.stdout) == (0, "closed 1 client\n")


def test_the_name_in_a_certificate_is_listed(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    options = ["--tls-client-ca", str(tmp_path / "ca.pem"), "--admin-port", "0"]
    with (
        Running(*certified(tmp_path), *options) as server,
        server.client(context=trust(tmp_path, "server")) as client,
    ):
        server.wait_for("agent.ready")
        client.who()
        assert of(listed(server), client)["tls_name"] == "server"


# The paths.


def request(server: Running, method: str, path: str, *headers: str) -> tuple[int, bytes]:
    with socket.create_connection(("127.0.0.1", server.admin_port()), timeout=LIMIT) as sock:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
        sock.sendall("\r\n".join(lines).encode())
        with sock.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.fixture(scope="module")
def guarded() -> Any:
    with Running("--admin-port", "0", env={"GSERVER_ADMIN_TOKEN": "s3cret"}) as server:
        server.wait_for("agent.ready")
        yield server


TOKEN = "Authorization: Bearer s3cret"


@pytest.mark.parametrize(
    ("method", "path", "headers", "code"),
    [
        ("GET", "/clients.json", (), 401),
        ("GET", "/clients.json", (TOKEN,), 200),
        ("GET", "/clients.json?sort=age&limit=1", (TOKEN,), 200),
        ("GET", "/clients.json?sort=name", (TOKEN,), 400),
        ("GET", "/clients.json?limit=-1", (TOKEN,), 400),
        ("POST", "/clients.json", (TOKEN,), 405),
        ("POST", "/kick?client=127.0.0.1", ("X-Gserver: 1",), 401),
        ("POST", "/kick?client=127.0.0.1", (TOKEN,), 403),  # As a web page would send it.
        ("POST", "/kick?client=127.0.0.1", (TOKEN, "X-Gserver: 1"), 200),
        ("POST", "/kick", (TOKEN, "X-Gserver: 1"), 400),
        ("POST", "/kick?client=a%0Ab", (TOKEN, "X-Gserver: 1"), 400),
        ("GET", "/kick?client=127.0.0.1", (TOKEN, "X-Gserver: 1"), 405),
    ],
)
def test_the_paths_need_the_token_and_the_right_request(
    guarded: Running, method: str, path: str, headers: tuple[str, ...], code: int
) -> None:
    assert request(guarded, method, path, *headers)[0] == code


def test_a_problem_is_one_line() -> None:
    for command in (("clients",), ("kick", "1.2.3.4")):
        done = gserver(*command, "--admin", "127.0.0.1:1")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "gserver: 127.0.0.1:1: Connection refused\n"


# Asking the workers. A thread acts as the supervisor and as a worker.

#: Of a worker that a thread acts for.
PID = 7


@pytest.fixture
def scoreboard() -> Scoreboard:
    """That of a server with one worker."""
    made = Scoreboard.create(1)
    made.cells[made.cell("pid", 0)] = PID
    return made


@contextmanager
def answered(
    scoreboard: Scoreboard, before_answer: Callable[[int], object]
) -> Iterator[tuple[Roster, list[int]]]:
    """A roster whose queries are answered, and the numbers of these queries."""
    ours, theirs = socket.socketpair()
    numbers: list[int] = []

    def answer() -> None:
        while True:
            order, fds, _, _ = socket.recv_fds(theirs, 1024, 1)
            if not order:
                return
            numbers.append(len(numbers) + 1)
            before_answer(numbers[-1])
            with socket.socket(fileno=fds[0]) as pair:
                pair.send(json.dumps({"clients": [], "end_of": PID}).encode())

    thread = Thread(target=answer)
    thread.start()
    with theirs:
        with ours:
            roster = Roster(scoreboard, ours.fileno())
            with roster._control:
                yield roster, numbers
            ours.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT)


#: How many lists are disturbed, how often the workers are asked, and the result.
MOVES = [(0, 1, True), (1, 2, True), (9, 2, False)]


@pytest.mark.parametrize(("moves", "asked", "is_complete"), MOVES)
def test_a_list_is_complete_if_no_client_has_moved_meanwhile(
    scoreboard: Scoreboard, moves: int, asked: int, is_complete: bool
) -> None:
    def move(number: int) -> None:
        if number <= moves:
            scoreboard.add("transfers", 2)

    with answered(scoreboard, move) as (roster, numbers):
        assert roster.document("age", 0)["is_complete"] is is_complete
        assert numbers == list(range(1, asked + 1))


def test_a_supervisor_that_is_stopped_does_not_block_a_list(scoreboard: Scoreboard) -> None:
    """It reads no orders, and the socket for them is full."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                ours.send(b"x")
        ours.setblocking(True)
        began = time.monotonic()
        roster = Roster(scoreboard, ours.fileno())
        with roster._control:
            assert not roster.document("age", 0)["is_complete"]
        assert time.monotonic() - began < 2 * ANSWER_SECONDS
