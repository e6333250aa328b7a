"""Many clients in conversations of every kind live through reloads."""

import signal
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from gserver.addresses import TCP, TLS
from lab import reload_load
from lab.child import Child
from lab.endpoints import Endpoints
from lab.running import LIMIT, Client, Running, argv, extended, until
from lab.tls13 import RecordClient
from lab.tls_client import certified, trust

RELOADS = 10
#: Half lines, running handlers, replies that are not taken, pipelines; and one that asks WHO.
PLAIN = {"partial": 900, "busy": 400, "slow": 300, "pipelined": 199, "watcher": 1}
#: Of each: half a TLS record, and half a PROXY header.
OTHERS = 100
BALANCER = "127.0.0.2"
MODULE = f"""{reload_load.MODULE}
from lab.commands import count_greenlets
from gserver.commands import command

@command("GREENLETS")
def greenlets(request):
    return count_greenlets()
"""


@pytest.mark.timeout(20 * LIMIT)
def test_2000_clients_in_conversations_live_through_ten_reloads(pems: Path, tmp_path: Path) -> None:
    options = argv(
        f"--bind tcp://127.0.0.1:0 --bind tls://127.0.0.1:0 --proxy-from {BALANCER}"
        " --server-id here --drain-timeout 2 --line-timeout 0 --write-timeout 0"
    )
    with extended(tmp_path, MODULE, *options, *certified(pems)) as server:
        ports = Endpoints(server, pems)
        plain = ports.port(TCP)
        with Client(plain) as client:
            greenlets = int(client.ask(b"GREENLETS"))
        memory = resident(server)
        crowd = [f"{kind}={number}" for kind, number in PLAIN.items()]
        load = Child("lab.reload_load", plain, "here", *crowd)
        for number in range(1, RELOADS + 1):
            with ExitStack() as stack:
                for _ in range(OTHERS):
                    half = stack.enter_context(
                        RecordClient(ports.port(TLS), trust(pems), fresh(tmp_path))
                    )
                    half.send(half.record(b"WHY\n")[:10])
                    proxied = stack.enter_context(Client(plain, source=BALANCER))
                    proxied.send(b"PROXY TC")
                server.send_signal(signal.SIGHUP)
                server.wait_for("server.reloaded", number, 5 * LIMIT)
        figures = load.result()
        assert (figures["lost"], figures["wrong"], figures["missing"]) == (0, 0, 0)
        assert figures["who_least"] >= sum(PLAIN.values())
        assert not server.events("worker.died")
        until(lambda: server.who() == 1, "the clients have left")
        with Client(plain) as client:
            assert int(client.ask(b"GREENLETS")) == greenlets
        assert resident(server) < memory + 30_000_000


def fresh(folder: Path) -> Path:
    """A folder without a log of keys."""
    (folder / "keys").unlink(missing_ok=True)
    return folder


def resident(server: Running) -> int:
    """The memory of the worker."""
    [worker] = server.workers()
    rss: int = psutil.Process(worker.pid).memory_info().rss
    return rss
