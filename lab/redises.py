"""Real Redis servers, real Sentinels, and a proxy as the network, each with faults for tests.

All listen on 127.0.0.1 and end with their `with` block. A method returns when it has taken effect.
"""

import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lab.certificates import make_certificates
from lab.host import HERE, Host
from lab.running import LIMIT, program, until

#: A failover takes three seconds, but a Sentinel that was delayed for two does nothing for the next
#: thirty.
FAILOVER_LIMIT = 4 * LIMIT
TLS = ["port 0", "tls-port PORT", "tls-auth-clients no"]
TLS += ["tls-ca-cert-file ca.pem", "tls-cert-file server.pem", "tls-key-file server.key"]
#: Any fault loses the data, unless a test changes this. Replicas are synchronised without waiting
#: for more of them.
DEFAULTS = {
    "save": '""',
    "appendonly": "no",
    "repl-diskless-sync-delay": 0,
    "unixsocket": "redis.sock",
}


def free_port(host: Host = HERE) -> int:
    """Return a port outside the ephemeral range, so it stays free while its server is down."""
    while True:
        with host.inside(), socket.socket() as probe, suppress(OSError):
            # A process that another thread starts now may briefly inherit the probe.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Not `random.randrange`: Hypothesis gives parallel test processes the same seed.
            probe.bind(("127.0.0.1", 20000 + secrets.randbelow(12768)))
            return int(probe.getsockname()[1])


def keys_of(cluster: str = "gserver") -> list[str]:
    """The keys of a cluster: its members, their leases, and its state."""
    return [f"{{gserver:{cluster}}}:{name}" for name in ("members", "leases", "state")]


class Server(ExitStack[None]):
    """A redis-server or redis-sentinel, with its own folder in `folder`."""

    def __init__(
        self, kind: str, folder: Path, lines: list[str], password: str = "", host: Host = HERE
    ) -> None:
        super().__init__()
        self.port = free_port(host)
        self.host = host
        self.password = password
        self.folder = folder / f"{kind}-{host.name}{self.port}"
        self.folder.mkdir()
        lines = [f'dir "{self.folder}"', f"bind {host.listens_on}", *lines]
        lines += [f"requirepass {password}"] if password else []
        lines += ["protected-mode no"] if host != HERE else []
        config = self.folder / "redis.conf"
        config.write_text("\n".join(lines).replace("PORT", str(self.port)) + "\n")
        self._argv = [program(kind), str(config)]
        self._log = self.folder / "log"
        self.ca_file, self.other_ca_file = self.folder / "ca.pem", self.folder / "other-ca.pem"
        self.is_tls = set(TLS) <= set(lines)
        if self.is_tls:
            make_certificates(self.folder)
        self.callback(self.kill)
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log, self.host.inside():
            self.process = subprocess.Popen(
                self._argv, stdout=log, stderr=log, start_new_session=True
            )
        try:
            until(self._is_ready, f"{self._argv} answers")
        except BaseException:
            self.kill()
            raise

    def _is_ready(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"{self._argv} ended: {self._log.read_text()}")
        try:
            return bool(self.command("PING"))
        except redis.ConnectionError:  # It does not listen yet, or is loading its data.
            return False

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        """Return the URL with another port: that of a Proxy."""
        login = f":{self.password}@" if self.password else ""
        return f"{'rediss' if self.is_tls else 'redis'}://{login}{self.host.address}:{port}"

    def command(self, *words: str | int | bytes) -> Any:
        """Return the reply to a command on a new connection; raise redis-py's error."""
        options: dict[str, Any] = {"ssl_ca_certs": str(self.ca_file)} if self.is_tls else {}
        options |= {
            "socket_timeout": LIMIT,
            "retry": Retry(NoBackoff(), 0),
            "decode_responses": True,
            "protocol": 2,
            "driver_info": None,  # From Redis 7.2 on, it would count as commands.
        }
        with self.host.inside(), redis.Redis.from_url(self.url, **options) as client:
            return client.execute_command(*words)

    def is_running(self) -> bool:
        """Whether the server is neither dead nor frozen."""
        return (
            self.process.poll() is None
            and psutil.Process(self.process.pid).status() != psutil.STATUS_STOPPED
        )

    def kill(self) -> None:
        """Send SIGKILL to the server, frozen or not, and to its children that save data."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(LIMIT)

    def freeze(self) -> None:
        """Stop it with SIGSTOP; the kernel still accepts connections for it."""
        self.process.send_signal(signal.SIGSTOP)
        until(lambda: not self.is_running(), "the server is frozen")

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        until(self.is_running, "the server runs again")


class Redis(Server):
    """A Redis server, also on `unix_url`; options are its own: `maxmemory_policy="noeviction"`."""

    def __init__(
        self,
        folder: Path,
        is_tls: bool = False,
        requirepass: str = "",
        host: Host = HERE,
        **options: Any,
    ) -> None:
        given = {name.replace("_", "-"): value for name, value in options.items()}
        lines = [f"{name} {value}" for name, value in {**DEFAULTS, **given}.items()]
        lines = [*(TLS if is_tls else ["port PORT"]), *lines]
        super().__init__("redis-server", folder, lines, requirepass, host)

    @property
    def unix_url(self) -> str:
        return f"unix://{f':{self.password}@' if self.password else ''}{self.folder}/redis.sock"

    def restart(self, keep_data: bool) -> None:
        """Kill and restart the server: empty, or as of its last SAVE or append-only write."""
        self.kill()
        dump, writes = self.folder / "dump.rdb", self.folder / "appendonlydir"
        if keep_data:
            assert dump.exists() or writes.exists(), "there are no data to keep: SAVE before"
        else:
            dump.unlink(missing_ok=True)
            shutil.rmtree(writes, ignore_errors=True)
        self.start()

    def wipe(self) -> None:
        self.command("FLUSHALL")

    def read_only(self) -> None:
        """Make it a replica that serves reads, as after a failover; its primary does not exist."""
        self.command("CONFIG", "SET", "replica-read-only", "yes", "replica-serve-stale-data", "yes")
        self.command("REPLICAOF", "127.0.0.1", 1)

    def writable(self) -> None:
        self.command("REPLICAOF", "NO", "ONE")

    def out_of_memory(self) -> None:
        self.command("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", 1)

    def enough_memory(self) -> None:
        self.command("CONFIG", "SET", "maxmemory", 0)

    def forget_scripts(self) -> None:
        self.command("SCRIPT", "FLUSH")

    def role(self) -> str:
        """Return `master` or `slave`; empty if it does not reply, as while Sentinels change it."""
        with suppress(redis.ConnectionError):
            return str(self.command("ROLE")[0])
        return ""

    def members(self, name: str = "gserver") -> dict[str, int]:
        """Return the number of clients that each server of a cluster last reported."""
        found: dict[str, str] = self.command("HGETALL", keys_of(name)[0])
        return {member: int(entry.split()[0]) for member, entry in found.items()}


class Sentinels(ExitStack[None]):
    """A primary and two replicas, watched by three Sentinels, of which two must agree.

    Each host has a Redis and a Sentinel.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "gserver",
        password: str = "",
        sentinel_password: str = "",
        hosts: Sequence[Host] = (HERE,) * 3,
    ) -> None:
        super().__init__()
        self.name = name
        self.redises: list[Redis] = []
        self.sentinels: list[Server] = []
        login: dict[str, Any] = {"masterauth": password} if password else {}
        with ExitStack() as stack:
            for host in hosts:
                self.redises.append(
                    stack.enter_context(Redis(folder, requirepass=password, host=host, **login))
                )
                first = self.redises[0]
                login["replicaof"] = f"{first.host.address} {first.port}"
            # A Sentinel looks for replicas when it starts, then only every ten seconds.
            until(
                lambda: first.command("INFO", "replication").get("connected_slaves") == 2,
                "both servers are replicas",
            )
            rules = [
                f"monitor {name} {first.host.address} {first.port} 2",
                f"down-after-milliseconds {name} 500",
                f"failover-timeout {name} 2000",
                *([f"auth-pass {name} {password}"] if password else []),
            ]
            lines = ["port PORT", *(f"sentinel {rule}" for rule in rules)]
            for host in hosts:
                sentinel = Server("redis-sentinel", folder, lines, sentinel_password, host)
                self.sentinels.append(stack.enter_context(sentinel))
            until(self.is_whole, "the Sentinels know each other and the replicas", FAILOVER_LIMIT)
            self.push(stack.pop_all())

    @property
    def url(self) -> str:
        login = f":{self.redises[0].password}@" if self.redises[0].password else ""
        query = (
            f"?sentinel_password={self.sentinels[0].password}" if self.sentinels[0].password else ""
        )
        hosts = ",".join(f"{each.host.address}:{each.port}" for each in self.sentinels)
        return f"redis+sentinel://{login}{hosts}/{self.name}{query}"

    def primary(self) -> Redis:
        """Return the Redis that all running Sentinels name, as soon as they agree."""

        def named() -> set[tuple[str, str]]:
            addresses = {(host, port) for host, port in self._ask("GET-MASTER-ADDR-BY-NAME")}
            return addresses if len(addresses) == 1 else set()

        ((host, port),) = until(named, "the Sentinels agree", FAILOVER_LIMIT)
        return next(
            one for one in self.redises if (one.host.address, one.port) == (host, int(port))
        )

    def order_failover(self) -> None:
        """Make the Sentinels replace a healthy primary; this does not wait for it.

        They demote it some ten seconds later: until then two Redis servers accept writes.
        """
        self._wait_until_settled()
        running = next(sentinel for sentinel in self.sentinels if sentinel.is_running())
        running.command("SENTINEL", "FAILOVER", self.name)

    def failover(self) -> Redis:
        """Order a failover; return the old primary when another has taken over."""
        with self.replacing(lambda _: self.order_failover()) as old:
            return old

    def kill_primary(self) -> Redis:
        """Kill the primary; return it when another has taken over."""
        with self.replacing(Redis.kill) as old:
            return old

    def freeze_primary(self) -> Redis:
        """Freeze the primary; return it when another has taken over.

        When it is thawed, it accepts writes for some ten seconds.
        """
        with self.replacing(Redis.freeze) as old:
            return old

    @contextmanager
    def replacing(self, fault: Callable[[Redis], object]) -> Iterator[Redis]:
        """Run the body right after a fault of the primary; after it, another has taken over."""
        old = self.primary()
        fault(old)
        yield old
        until(
            lambda: self.primary() is not old and self.primary().role() == "master",
            "another server is primary",
            FAILOVER_LIMIT,
        )

    def rejoin(self, redis: Redis) -> None:
        """Start a killed Redis as a replica; return when the Sentinels know it."""
        redis.start()
        primary = self.primary()
        redis.command("REPLICAOF", primary.host.address, primary.port)
        self._wait_until_settled()

    def _ask(self, subcommand: str) -> list[Any]:
        """Return the reply of each running Sentinel."""
        return [
            one.command("SENTINEL", subcommand, self.name)
            for one in self.sentinels
            if one.is_running()
        ]

    def is_whole(self) -> bool:
        """Whether one server is primary, two follow it, and another failover is possible."""
        if not all(each.is_running() for each in (*self.redises, *self.sentinels)):
            return False
        try:
            roles = [one.command("ROLE") for one in self.redises]
        except redis.RedisError:
            return False
        primaries = [one for one, role in zip(self.redises, roles, strict=True) if len(role) == 3]
        followed = [role[1:4] for role in roles if len(role) == 5]
        return (
            len(primaries) == 1
            and followed == 2 * [[primaries[0].host.address, primaries[0].port, "connected"]]
            and self._can_fail_over()
        )

    def _can_fail_over(self) -> bool:
        """Whether every running Sentinel knows the others, and a replica that can take over."""
        primaries = map(_fields, self._ask("MASTER"))
        replicas = [list(map(_fields, found)) for found in self._ask("REPLICAS")]
        return all(
            one["flags"] == "master" and one["num-other-sentinels"] == "2" for one in primaries
        ) and all(
            any(one["flags"] == "slave" and one["master-link-status"] == "ok" for one in found)
            for found in replicas
        )

    def _wait_until_settled(self) -> None:
        until(self._can_fail_over, "the Sentinels can replace the primary", FAILOVER_LIMIT)


class Pair(ExitStack[None]):
    """Two Redis that know nothing of each other, each on its host."""

    def __init__(self, folder: Path, hosts: Sequence[Host] = (HERE,) * 2) -> None:
        super().__init__()
        with ExitStack() as stack:
            self.redises = [stack.enter_context(Redis(folder, host=host)) for host in hosts]
            self.push(stack.pop_all())

    @property
    def url(self) -> str:
        return " ".join(redis.url for redis in self.redises)

    def is_whole(self) -> bool:
        """Whether both run."""
        return all(redis.is_running() for redis in self.redises)


def _fields(flat: list[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


class Proxy(ExitStack[None]):
    """The network before a port of 127.0.0.1: another port that forwards bytes, or loses them.

    Lost bytes are received, and so is the end of input: the sender does not notice the loss.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = free_port()
        self.delay_seconds = 0.0
        #: Turns the bytes of a reply into the pieces to send instead.
        self.alter: Callable[[bytes], Iterable[bytes]] = lambda data: [data]
        self.is_dropping = self.drop_requests = self.drop_replies = False
        self.bytes_to_server = self.bytes_to_client = self.bytes_dropped = 0
        self._server = "127.0.0.1", port
        self._sockets: set[socket.socket] = set()
        self.accept()
        self.callback(self.refuse)

    def accept(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def refuse(self) -> None:
        """Close the port, and reset all connections."""
        with suppress(OSError):  # The port is already closed.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(LIMIT)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Reset all connections, on both sides. New ones are accepted."""
        while self._sockets:
            _reset(self._sockets.pop())

    def point_at(self, port: int) -> None:
        """Forward new connections to another port. Those that exist stay where they are."""
        self._server = "127.0.0.1", port

    @contextmanager
    def instead(self, port: int) -> Iterator[None]:
        """Forward to another port during the body; reset all connections before and after it."""
        before, self._server = self._server, ("127.0.0.1", port)
        self.cut()
        yield
        self._server = before
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):  # The port was closed.
            while True:
                client, _ = self._listener.accept()
                self._sockets.add(client)
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._server, LIMIT)
        except OSError:
            self._sockets.discard(client)
            _reset(client)
            return
        server.settimeout(None)
        self._sockets.add(server)
        replies = threading.Thread(target=self._pass_on, args=(server, client, True), daemon=True)
        replies.start()
        self._pass_on(client, server, False)
        replies.join()
        for connection in (client, server):
            connection.close()
            self._sockets.discard(connection)

    def _pass_on(self, source: socket.socket, target: socket.socket, is_reply: bool) -> None:
        """Forward one direction until its end. An error, or `cut`, ends the other one too."""
        data = b"?"
        try:
            while data:
                data = source.recv(65536)
                size = len(data)
                if source not in self._sockets:  # Woken by `cut`, not by an end of input.
                    raise ConnectionResetError
                time.sleep(self.delay_seconds)
                if self.is_dropping or (self.drop_replies if is_reply else self.drop_requests):
                    self.bytes_dropped += size
                elif not data:
                    target.shutdown(socket.SHUT_WR)
                else:
                    self.bytes_to_client += size if is_reply else 0
                    self.bytes_to_server += 0 if is_reply else size
                    for piece in self.alter(data) if is_reply else [data]:
                        target.sendall(piece)
        except OSError:
            _reset(source)
            _reset(target)


def _reset(connection: socket.socket) -> None:
    """Reset a connection at once, although a thread reads from it."""
    with connection, suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
