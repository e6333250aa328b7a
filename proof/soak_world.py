"""Where a soak runs: three servers, a Redis with replicas and Sentinels, a port for StatsD."""

import http.client
import json
import math
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from lab.admin import status
from lab.certificates import make_certificates
from lab.redises import Redis, Sentinels, free_port
from lab.running import GSERVER, LIMIT, PATIENCE, Client, Event, Running
from lab.site import CENSUS
from lab.tls_client import TlsClient, certified, trust

WORKERS = 2
MAX_CLIENTS = 300
NAMES = ("one", "two", "three")


def eventually(
    condition: Callable[[], Any], what: str | Callable[[], str], limit: float = 2 * LIMIT
) -> Any:
    """Return the first true value; AssertionError when there is none within the limit."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(
                f"not within {limit:.0f} s: {what if isinstance(what, str) else what()}"
            )
        time.sleep(0.05)
    return value


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
        """Read them to the end."""
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
    """A server whose log is judged as it comes."""

    log_type = Log
    lines: Log


class Member:
    """One of the servers: it keeps its name and port when it is started again."""

    def __init__(self, name: str, folder: Path, *options: str, is_tls: bool = False) -> None:
        self.name, self.is_tls, self.port = name, is_tls, free_port()
        #: "" while no client may be lost, "lost" while one may, "away" while it may not even
        #: connect.
        self.excuse = ""
        self._folder, self._trust = folder, trust(folder)
        words = [
            "--server-id",
            name,
            "--workers",
            str(WORKERS),
            "--max-clients",
            str(MAX_CLIENTS),
            "--admin-port",
            "0",
        ]
        words += ["--log-format", "json", "--log-level", "debug", "--commands", "census"]
        self._options = [*words, *(certified(folder) if is_tls else []), *options]
        self.start()

    def start(self) -> None:
        """Start it, out of reach of a terminal's Ctrl-C; let it have had a crowd."""
        self.deaths = 0  #: of processes, which a fault has caused
        command = ["setsid", *GSERVER, "serve", "--port", str(self.port), *self._options]
        self.running = LoggedServer(command=command, cwd=self._folder)
        self.log = self.running.lines
        self.running.wait_for("agent.ready")
        with ExitStack() as stack:
            for _ in range(MAX_CLIENTS):
                with suppress(OSError):
                    stack.enter_context(self.client()).send(b"WHY\nNO\nWH")

    def complaints(self) -> list[str]:
        """What it should never have said, since the last call."""
        told = [
            each.pop(0) for each in (self.running.errors, self.log.bad) for _ in range(len(each))
        ]
        died = self.log.actions["worker.died"] + self.log.actions["agent.died"]
        told += [f"{died - self.deaths} processes died by themselves"] * (died > self.deaths)
        self.deaths = died
        return [f"{self.name}: {text}" for text in told]

    def client(self) -> Client:
        """A new client, of the server's kind."""
        return TlsClient(self.port, self._trust) if self.is_tls else Client(self.port)

    def status(self) -> Any:
        """What its admin port tells; None where it tells nothing."""
        with suppress(OSError, http.client.HTTPException, AssertionError):
            return status(self.running)
        return None

    def clients(self) -> dict[int, int]:
        """How many clients each worker has, by its pid."""
        found = self.status() or {"workers": {"each": []}}
        return {worker["pid"]: worker["clients"] for worker in found["workers"]["each"]}

    def processes(self) -> dict[str, psutil.Process]:
        """All of them, by role and pid."""
        roles = {"supervisor": [psutil.Process(self.running.pid)], "worker": self.running.workers()}
        roles |= {"agent": self.running.agents()}
        return {f"{role} {each.pid}": each for role, found in roles.items() for each in found}

    def is_well(self, ceiling: int) -> bool:
        """Whether it is as it should be when nothing is wrong, as it says itself."""
        told = self.status()
        if not told or not self.processes().keys() >= {
            f"worker {each['pid']}" for each in told["workers"]["each"]
        }:
            return False
        cluster = told["cluster"]
        is_fresh = not cluster["is_held"] and (cluster["age_seconds"] or math.inf) < 1.5 * PATIENCE
        is_whole = len(self.processes()) == WORKERS + 2 and told["workers"]["now"] == WORKERS
        is_known = cluster["servers"] == len(NAMES) and cluster["clients"] <= ceiling
        return told["server"]["state"] == "ready" and is_fresh and is_whole and is_known

    def has(self, clients: dict[int, int]) -> bool:
        """Whether its workers have so many."""
        return self.clients() == clients

    def one_client_each(self, stack: ExitStack) -> dict[int, Client]:
        """A client for each worker, by its pid, and nobody else."""
        chosen: dict[int, Client] = {}
        while len(chosen) < WORKERS:
            before = self.clients()
            client = self.client()
            client.ask(b"WHY")
            [pid] = [pid for pid, count in self.clients().items() if count > before[pid]]
            if pid in chosen:
                client.sock.close()
                eventually(partial(self.has, before), "it has gone")
            else:
                chosen[pid] = stack.enter_context(client)
        return chosen


class World(ExitStack):
    """All of it. It ends with its `with` block."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__()
        self.random, self.sink_port, self.members = random.Random(seed), free_port(), list[Member]()
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
                    Member(name, folder, *words, "--statsd-prefix", name, is_tls=name == NAMES[-1])
                )
            self.push(stack.pop_all())

    def open_sink(self) -> None:
        """Have a port that gets what is sent to a StatsD daemon."""
        self.sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sink.bind(("127.0.0.1", self.sink_port))
        self.sink.settimeout(LIMIT)

    def _end(self) -> None:
        self.sink.close()
        for member in self.members:
            member.running.kill()

    @property
    def primary(self) -> Redis:
        """The primary, as the Sentinels say."""
        return self.redises.primary()

    @property
    def replicas(self) -> list[Redis]:
        """Those that are not."""
        return [each for each in self.redises.redises if each.port != self.primary.port]

    def heal(self) -> None:
        """End what was done to Redis and its Sentinels."""
        for each in [*self.redises.redises, *self.redises.sentinels]:
            if each.process.poll() is not None:
                each.start()
            elif not each.is_running():
                each.thaw()
        for redis in self.redises.redises:
            redis.enough_memory()

    def are_well(self, ceiling: int) -> bool:
        """Whether every server is."""
        return all(member.is_well(ceiling) for member in self.members)

    def census(self, at: float) -> dict[str, Any]:
        """What is held by whom, with one client for each worker; what WHO says then."""
        with ExitStack() as stack:
            for member in self.members:
                eventually(
                    partial(member.has, dict.fromkeys(member.clients(), 0)),
                    f"{member.name} has no clients",
                )
            clients = {member: member.one_client_each(stack) for member in self.members}
            count = WORKERS * len(self.members)
            asked = {member.name: next(iter(their.values())) for member, their in clients.items()}
            with suppress(AssertionError):  # It is judged later.
                eventually(
                    lambda: {client.who() for client in asked.values()} == {count}, "WHO is exact"
                )
            who = {name: client.who() for name, client in asked.items()}
            held: dict[str, list[int]] = {}
            for member, their in clients.items():
                for client in their.values():
                    client.ask(
                        b"CENSUS"
                    )  # It has a greenlet now, which waits again when it asks once more.
                greenlets = {pid: int(client.ask(b"CENSUS")) for pid, client in their.items()}
                for name, process in member.processes().items():
                    figures = [
                        process.memory_info().rss,
                        process.num_fds(),
                        greenlets.get(process.pid, 0),
                    ]
                    held[f"{member.name} {name}"] = figures
            return {"at": round(at, 1), "clients": count, "who": who, "held": held}
