"""The scene of a soak: three servers, a Redis with replicas and Sentinels, a port for StatsD."""

import http.client
import json
import math
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lab.admin import status
from lab.census import CENSUS, connect_crowd, held, one_each
from lab.certificates import make_certificates
from lab.load import KINDS
from lab.member import Member
from lab.redises import Redis, Sentinels, free_port
from lab.running import LIMIT, PATIENCE, Client, Event, Running, until
from lab.tls_client import certified, trust

WORKERS = 2
MAX_CLIENTS = 300
NAMES = ("one", "two", "three")
#: The kinds of clients that each server has.
CALLERS = (*KINDS, "stays", "stays", "comes_and_goes")
#: The largest reply to WHO, without additional crowds.
CEILING = 3 * len(CALLERS) * len(NAMES)


#: Polling a server costs it time, and a soak is not in a hurry.
settle = partial(until, limit=2 * LIMIT, pause=0.05)


class Log(list[str]):
    """The log lines of a server. Those of debug level are only counted.

    The reader waits while `may_read` is clear.
    """

    def __init__(self) -> None:
        super().__init__()
        self.may_read = threading.Event()
        self.may_read.set()
        self.actions: Counter[str] = Counter()
        self.bad: list[str] = []

    def extend(self, lines: Iterable[str]) -> None:
        """Read the lines to the end."""
        for line in lines:
            self.may_read.wait()
            try:
                event: Event = json.loads(line)
                action, level = event.get("event.action", "of a package"), event["log.level"]
            except (ValueError, KeyError, AttributeError):
                action, level = "no event", ""
            self.actions[action] += 1
            if action in ("no event", "process.error", "process.not_started"):
                self.bad.append(line)
            elif level != "debug":
                self.append(line)


class LoggedServer(Running):
    """A server whose log is judged line by line."""

    log_type = Log
    lines: Log


class SoakedMember(Member):
    """One of the servers, unaffected by a terminal's Ctrl-C."""

    server_type = LoggedServer
    server: LoggedServer
    words = ("setsid",)

    def __init__(self, name: str, folder: Path, *options: str, is_tls: bool = False) -> None:
        self.is_tls, self.excuse = is_tls, ""  #: see `load.Target`
        self._context = trust(folder) if is_tls else None
        words = ["--server-id", name, "--workers", str(WORKERS), "--admin-port", "0"]
        words += ["--max-clients", str(MAX_CLIENTS), "--commands", "census"]
        words += ["--log-format", "json", "--log-level", "debug"]
        words += certified(folder) if is_tls else []
        super().__init__(name, *words, *options, cwd=folder)

    def start(self) -> None:
        """Start the server, and connect a crowd once."""
        super().start()
        self.log, self.deaths = self.server.lines, 0  #: deaths of processes that a fault has caused
        connect_crowd(self.client, MAX_CLIENTS)

    def problems(self) -> list[str]:
        """The errors in its output since the last call."""
        found = [
            each.pop(0) for each in (self.server.errors, self.log.bad) for _ in range(len(each))
        ]
        died = self.log.actions["worker.died"] + self.log.actions["agent.died"]
        found += [f"{died - self.deaths} processes died by themselves"] * (died > self.deaths)
        self.deaths = died
        return [f"{self.name}: {text}" for text in found]

    def client(self) -> Client:
        """A new client, over TLS if the server has it."""
        return Client(self.port, context=self._context)

    def plain_client(self) -> Client:
        """A new client without TLS."""
        return Client(self.port)

    def status(self) -> Any:
        """The status from its admin port; None if there is no response."""
        with suppress(OSError, http.client.HTTPException, AssertionError):
            return status(self.server)
        return None

    def is_well(self, ceiling: float) -> bool:
        """Whether the server reports that everything is in order."""
        status, processes = self.status(), self.server.named_processes()
        if not status or not processes.keys() >= {
            f"worker {each['pid']}" for each in status["workers"]["each"]
        }:
            return False
        cluster = status["cluster"]
        is_fresh = not cluster["is_held"] and (cluster["age_seconds"] or math.inf) < 1.5 * PATIENCE
        is_whole = len(processes) == WORKERS + 2 and status["workers"]["now"] == WORKERS
        is_known = cluster["servers"] == len(NAMES) and cluster["clients"] <= ceiling
        return status["server"]["state"] == "ready" and is_fresh and is_whole and is_known


class World(ExitStack):
    """The whole scene. It ends with its `with` block."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__()
        self.random, self.sink_port, self.members = (
            random.Random(seed),
            free_port(),
            list[SoakedMember](),
        )
        make_certificates(folder)
        (folder / "census.py").write_text(CENSUS)
        with ExitStack() as stack:
            self.redises = stack.enter_context(Sentinels(folder))
            self.open_sink()
            stack.callback(self._end)
            words = [
                "--redis-url",
                self.redises.url,
                "--statsd-host",
                "127.0.0.1",
                "--statsd-port",
                str(self.sink_port),
            ]
            for name in NAMES:
                self.members.append(
                    SoakedMember(
                        name, folder, *words, "--statsd-prefix", name, is_tls=name == NAMES[-1]
                    )
                )
            self.push(stack.pop_all())

    def open_sink(self) -> None:
        """Open the port to which StatsD datagrams are sent."""
        self.sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sink.bind(("127.0.0.1", self.sink_port))
        self.sink.settimeout(LIMIT)

    def _end(self) -> None:
        self.sink.close()
        for member in self.members:
            member.end()

    @property
    def primary(self) -> Redis:
        """The primary that the Sentinels name."""
        return self.redises.primary()

    @property
    def replicas(self) -> list[Redis]:
        """The Redis servers that are not primary."""
        return [each for each in self.redises.redises if each.port != self.primary.port]

    def heal(self) -> None:
        """End the faults of Redis and its Sentinels."""
        for each in [*self.redises.redises, *self.redises.sentinels]:
            if each.process.poll() is not None:
                each.start()
            elif not each.is_running():
                each.thaw()
        for redis in self.redises.redises:
            redis.enough_memory()

    def are_well(self, ceiling: float) -> bool:
        """Whether every server is well."""
        return all(member.is_well(ceiling) for member in self.members)

    def census(self, at: float) -> dict[str, Any]:
        """The resources of each process, and WHO, with one client for each worker."""
        with ExitStack() as stack:
            clients = {
                member: one_each(member.server, member.client, stack) for member in self.members
            }
            count = WORKERS * len(self.members)
            asked = {member.name: next(iter(their.values())) for member, their in clients.items()}
            with suppress(AssertionError):  # The report is judged later.
                until(
                    lambda: {client.who() for client in asked.values()} == {count}, "WHO is exact"
                )
            return {
                "at": round(at, 1),
                "clients": count,
                "who": {name: client.who() for name, client in asked.items()},
                "held": {
                    f"{member.name} {name}": [*figures]
                    for member, their in clients.items()
                    for name, figures in held(member.server, their).items()
                },
            }
