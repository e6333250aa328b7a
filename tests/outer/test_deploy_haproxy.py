"""The shipped HAProxy configuration in front of a cluster of three servers under load.

One server drains, one dies, one retires.
"""

import json
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from gserver.config import Config
from lab.admin import get
from lab.documents import DEPLOYING, section
from lab.haproxy import CONFIG, TRUSTED, Front
from lab.redises import Redis
from lab.running import LIMIT, PATIENCE, Client, Running, argv, program, until

#: The drain delay that the configuration requires, on a machine without other work.
DRAIN_DELAY = 2.0 * PATIENCE
CLIENTS = 12
#: The form of the reply to each command that the load sends.
REPLIES = {b"WHO": rb"[0-9]+", b"WHERE": rb"server-[0-9]", b"WHY": rb"42"}


class Load:
    """Clients that send requests all the time; they reconnect now and then, and when closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(CLIENTS)
        ]
        self.answered = [0] * CLIENTS
        #: For each request that had to be repeated: the time, and the number of earlier repeats.
        self.retries: list[tuple[float, int]] = []
        self.failures: list[str] = []
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        try:
            while not self._is_over.is_set():
                self._ask_some(number)
        except Exception as error:  # noqa: BLE001 (any exception fails the test)
            self.failures.append(repr(error))

    def _ask_some(self, number: int) -> None:
        client = None
        for command in [*REPLIES] * 7:
            for tries in range(4):
                client = client or Client(self._port)
                reply = self._ask(client, command)
                if reply:
                    assert re.fullmatch(REPLIES[command] + rb"\n", reply), (command, reply)
                    self.answered[number] += 1
                    break
                self.retries.append((time.monotonic(), tries))
                client.sock.close()
                client = None
            else:
                raise AssertionError(f"{command!r} was not answered")
            if self._is_over.wait(0.005):
                break
        if client:
            client.sock.close()

    @staticmethod
    def _ask(client: Client, command: bytes) -> bytes:
        """The reply; empty if the connection ended without one."""
        try:
            client.send(command + b"\n")
            return client.line()
        except (ConnectionResetError, BrokenPipeError):
            return b""

    def repeated(self, since: float = 0.0) -> list[int]:
        """The numbers of earlier repeats of the requests that were repeated since that time."""
        return [tries for when, tries in self.retries if when >= since]

    def wait_for_replies(self) -> None:
        """Wait until every client has some more replies."""
        before = list(self.answered)
        until(
            lambda: (
                self.failures
                or all(now > old + 30 for now, old in zip(self.answered, before, strict=True))
            ),
            "",
        )
        assert self.failures == []

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(LIMIT)


@contextmanager
def service(folder: Path, *options: str) -> Iterator[tuple[list[Running], Front, Load]]:
    """Three servers, HAProxy in front of them, and clients that send requests."""
    with ExitStack() as stack:
        redis = stack.enter_context(Redis(folder))
        common = [
            "--redis-url",
            redis.url,
            *argv(f"--admin-port 0 --drain-delay {DRAIN_DELAY}"),
            *TRUSTED,
            *options,
        ]
        servers = [
            stack.enter_context(Running("--server-id", f"server-{number}", *common))
            for number in (1, 2, 3)
        ]
        front = stack.enter_context(Front(folder, servers))
        load = Load(front.port)
        stack.callback(load.stop)
        load.wait_for_replies()
        yield servers, front, load


def accepts(port: int) -> bool:
    """Whether the port accepts connections."""
    with suppress(ConnectionRefusedError), Client(port):
        return True
    return False


def test_the_configuration_is_valid() -> None:
    done = subprocess.run(
        [program("haproxy"), "-c", "-f", str(CONFIG)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()


def test_the_configuration_is_as_the_page_says() -> None:
    text, page = CONFIG.read_text(), section("Behind HAProxy", DEPLOYING)
    for pattern, said in {
        r"balance leastconn": "least connections",
        r"hard-stop-after (\d+)s": "connections go on for up to {} s (`hard-stop-after`)",
        r"timeout client (\d+)h\n +timeout server \1h": "silent for {} h",
        r"tcp-ut (\d+)s": "vanishes end after {} s",
        r"timeout queue (\d+)s": "lets a new client wait for {} s (`timeout queue`)",
    }.items():
        found = re.search(rf"^ +(?:default-server .*)?{pattern}$", text, re.M)
        assert found, pattern
        assert said.format(*found.groups()) in page, pattern
    # HAProxy sees the end of a connection before the server has uncounted it, so it needs a
    # margin.
    [most] = re.findall(r"default-server .*maxconn (\d+)", text)
    assert 0.95 * Config().max_clients < int(most) < Config().max_clients


def test_no_client_is_rejected_while_a_server_has_room_and_excess_waits(tmp_path: Path) -> None:
    sizes = [5, 20, 20]
    with ExitStack() as stack:
        common = [*TRUSTED, "--admin-port", "0", "--max-clients"]
        servers = [
            stack.enter_context(Running("--server-id", f"server-{number}", *common, str(size)))
            for number, size in enumerate(sizes, 1)
        ]
        margin = [str(size - 1) for size in sizes]
        front = stack.enter_context(
            Front(tmp_path, servers, of_one_address=sum(map(int, margin)) + 1, maxconn=margin)
        )
        clients = [stack.enter_context(Client(front.port)) for _ in range(sum(map(int, margin)))]
        served = Counter(client.ask(b"WHERE").decode() for client in clients)
        assert served == {f"server-{number}": size - 1 for number, size in enumerate(sizes, 1)}
        with Client(front.port) as late:
            late.send(b"WHY\n")
            late.sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                late.line()
            with suppress(ConnectionResetError), Client(front.port) as more:
                more.sock.settimeout(PATIENCE)
                assert more.rest() == b"", "one address gets exactly this many places"
            late.sock.settimeout(LIMIT)
            clients[0].sock.close()
            assert late.line() == b"42\n"


def test_servers_drain_and_die_under_load_and_every_request_is_answered(tmp_path: Path) -> None:
    with service(tmp_path) as (servers, front, load):
        one, other, _ = servers
        assert load.retries == []
        # Health checks do not count: WHO is the load's clients and the asking one.

        # A drain: HAProxy notices while the server still accepts, so only existing connections are
        # closed.
        one.send_signal(signal.SIGTERM)
        until(
            lambda: front.states()["gs1"] == "DOWN", "HAProxy sees the server draining", DRAIN_DELAY
        )
        assert one.process.poll() is None
        assert load.retries == []
        assert one.exit_code() == 0
        load.wait_for_replies()
        assert set(load.repeated()) <= {0}, "no request had to be sent a third time"
        assert len(load.retries) <= CLIENTS

        # A crash: connections break, and requests in progress are repeated. While the processes
        # die, the kernel may still accept; after that HAProxy cannot connect, check or not.
        other.kill()
        load.wait_for_replies()
        began = time.monotonic()
        load.wait_for_replies()
        assert load.repeated(began) == []
        until(
            lambda: front.states() == {"gs1": "DOWN", "gs2": "DOWN", "gs3": "UP"},
            "HAProxy sees that the server is down",
        )
        load.wait_for_replies()
        load.stop()
        assert load.failures == []


def test_a_lame_duck_serves_its_clients_and_gets_no_new_ones(tmp_path: Path) -> None:
    with service(tmp_path, "--drain-timeout", "60") as (servers, front, load), ExitStack() as stack:
        held: dict[str, Client] = {}
        while len(held) < 3:  # Least connections: soon every server has one of these clients.
            client = stack.enter_context(Client(front.port))
            held.setdefault(client.ask(b"WHERE").decode(), client)
        servers[0].send_signal(signal.SIGUSR2)
        servers[0].wait_for("server.retiring")
        until(
            lambda: front.states()["gs1"] == "DOWN", "HAProxy sees the server retiring", DRAIN_DELAY
        )
        # All clients of the load have reconnected over time; none was closed early.
        load.wait_for_replies()
        load.wait_for_replies()
        assert load.retries == []
        assert held["server-1"].ask(b"WHERE") == b"server-1"
        assert servers[0].process.poll() is None
        with Client(front.port) as new:
            assert new.ask(b"WHERE") != b"server-1"
        began = time.monotonic()
        held["server-1"].sock.close()
        for client in held.values():
            client.sock.close()
        stack.close()
        assert servers[0].exit_code() == 0
        assert time.monotonic() - began < LIMIT
        load.stop()
        assert (load.failures, load.retries) == ([], [])
        with Client(front.port) as client:  # Health checks do not count.
            until(lambda: client.who() == 1, "WHO counts only the asking client")


def test_haproxy_itself_stops_without_breaking_a_connection(tmp_path: Path) -> None:
    with service(tmp_path) as (_, front, load):
        load.stop()
        with Client(front.port) as client:
            assert client.ask(b"WHY") == b"42"
            front.process.send_signal(signal.SIGUSR1)
            until(lambda: not accepts(front.port), "HAProxy no longer accepts")
            assert client.ask(b"WHY") == b"42"
        assert front.process.wait(LIMIT) == 0


def test_servers_know_the_addresses_of_the_clients(tmp_path: Path) -> None:
    with ExitStack() as stack:
        options = [*TRUSTED, "--admin-port", "0"]
        servers = [stack.enter_context(Running(*options)) for _ in range(3)]
        front = stack.enter_context(Front(tmp_path, servers))
        sources = [f"127.0.0.{number}" for number in range(20, 26)]
        for source in sources:
            client = stack.enter_context(Client(front.port, source=source))
            assert client.ask(b"WHY") == b"42"

        def listed() -> list[str]:
            found = [json.loads(get(server, "/clients.json")[2])["clients"] for server in servers]
            return sorted(client["address"] for each in found for client in each)

        until(lambda: listed() == sources, "they are listed")
        # Other clients need no balancer.
        assert {server.who() for server in servers} == {3}


def test_statistics_are_for_people_and_for_prometheus(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(Running(*TRUSTED, "--admin-port", "0")) for _ in range(3)]
        front = stack.enter_context(Front(tmp_path, servers))
        where = f"http://127.0.0.1:{front.statistics_port}"
        with urllib.request.urlopen(where, timeout=LIMIT) as page:
            assert b"gs3" in page.read()
        with urllib.request.urlopen(f"{where}/metrics", timeout=LIMIT) as page:
            figures = page.read().decode()
        assert 'haproxy_server_status{proxy="gservers",server="gs1",state="UP"} 1' in figures
