"""Processes that die, hang or get signals: other clients do not notice, and nothing remains."""

import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event

import psutil
import pytest

from lab import reload_load
from lab.admin import get
from lab.child import Child
from lab.installed import Installed
from lab.redises import Redis, free_port
from lab.rows import ALL, PLAIN, SEVERAL, Notes, Variant, row
from lab.running import (
    GSERVER,
    LIMIT,
    PATIENCE,
    Client,
    Running,
    gserver,
    left_over,
    program,
    stopped,
    unavailable,
    until,
)
from lab.site import SEED, Site

Start = Callable[..., Site]
Choice = Callable[[Site], list[psutil.Process]]
FOR_ALL = [
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCHLD,
    signal.SIGWINCH,
    signal.SIGURG,
    signal.SIGCONT,
]
FOR_SUPERVISOR = [number for number in FOR_ALL if number not in (signal.SIGINT, signal.SIGUSR2)]
#: During 20 reloads, at least.
CONNECTS = 5_000


@row(
    "Workers and agent killed",
    *ALL,
    values={
        "a worker": lambda site: site.server.workers()[:1],
        "the agent": lambda site: site.server.agents(),
        "all": lambda site: site.server.workers() + site.server.agents(),
    },
)
def test_killed_processes_are_replaced(start: Start, notes: Notes, kind: Choice) -> None:
    site = start()
    victims = kind(site)
    with site.neighbours() as neighbours:
        site.may_lose = victims != site.server.agents()
        for victim in victims:
            victim.kill()
        site.await_others(victims)
        neighbours.are_served()
        died = [
            event for event in site.server.events() if str(event["event.action"]).endswith(".died")
        ]
        notes.happened(
            f"{[event['message'] for event in died]}, neighbours lost {neighbours.lost} connections"
        )
        assert len(died) == len(victims)
        assert neighbours.lost or not site.may_lose or len(victims) < site.variant.workers


@row("Workers and agent killed again and again", *ALL, quick=ALL[1])
def test_a_loop_of_kills_leaves_nothing_behind(start: Start, notes: Notes) -> None:
    site, drawn = start(), random.Random(SEED)
    site.may_lose = True
    with site.neighbours() as neighbours:
        for number in range(30):
            if number % 3 == 0:
                site.server.send_signal(signal.SIGHUP)
            running = site.server.workers() + site.server.agents()
            for victim in drawn.sample(running, min(len(running), drawn.randint(1, 3))):
                with suppress(psutil.NoSuchProcess):  # A reload may have ended it.
                    victim.kill()
            time.sleep(drawn.random() / 2)
        site.await_others()
        neighbours.are_served()
        died = len(site.server.events("worker.died")) + len(site.server.events("agent.died"))
        notes.happened(
            f"{died} died, {len(site.server.events('server.reload_failed'))} reloads failed"
        )
        assert died


@row(
    "Worker or agent hangs",
    *PLAIN,
    values={
        "worker": lambda site: site.server.workers(),
        "agent": lambda site: site.server.agents(),
    },
    quick=ALL[1],
)
def test_a_process_that_hangs_is_replaced(start: Start, notes: Notes, kind: Choice) -> None:
    site = start("--hang-timeout", "2")
    [victim, *_] = kind(site)
    others = {*site.server.processes()} - {victim}
    with site.neighbours() as neighbours:
        site.may_lose = "worker" in victim.cmdline()
        victim.suspend()
        site.await_others([victim])
        neighbours.are_served()
        [hung] = [
            event for event in site.server.events() if str(event["event.action"]).endswith(".hung")
        ]
        notes.happened(hung["message"])
        assert (hung["log.level"], hung["gserver.child_pid"]) == ("error", victim.pid)
        assert others < {*site.server.processes()}


@row("An agent hangs before a reload", *PLAIN, quick=ALL[0])
def test_an_agent_that_hangs_while_ending_is_replaced_as_quickly(
    start: Start, notes: Notes
) -> None:
    site = start("--hang-timeout", "2", "--drain-timeout", "120")
    [agent] = site.server.agents()
    with site.neighbours() as neighbours:
        site.may_lose = True
        agent.suspend()
        site.server.send_signal(signal.SIGHUP)
        site.server.wait_for("server.reloaded")
        notes.happened(site.server.wait_for("agent.hung")["message"])
        site.server.wait_for("agent.ready", 2)
        neighbours.are_served()
    assert site.server.events("agent.died") == []


@row("A worker hangs during a stop", *PLAIN, quick=ALL[0])
def test_a_worker_that_hangs_delays_a_stop_by_the_hang_timeout_at_most(
    start: Start, notes: Notes
) -> None:
    site = start("--hang-timeout", "2", "--drain-timeout", "120")
    worker = site.server.workers()[0]
    worker.suspend()
    site.server.send_signal(signal.SIGTERM)
    assert site.server.exit_code() == 0
    [hung] = site.server.events("worker.hung")
    notes.happened(hung["message"])
    assert hung["gserver.child_pid"] == worker.pid


@row("Handler that never yields", *PLAIN, *SEVERAL[1:], quick=ALL[1])
def test_a_worker_whose_handler_computes_for_ever_is_replaced(start: Start, notes: Notes) -> None:
    site = start("--hang-timeout", "2", "--commands", "lab.commands")
    before = site.server.workers()
    with site.neighbours() as neighbours, site.client() as client:
        site.may_lose = True
        client.send(b"SPIN\n")
        notes.happened(site.server.wait_for("worker.hung")["message"])
        until(lambda: len(set(site.server.workers()) - set(before)) == 1, "the worker is replaced")
        neighbours.are_served()


@row("All processes stopped for a while", *PLAIN)
def test_no_process_counts_as_hung_after_the_machine_was_suspended(
    start: Start, notes: Notes
) -> None:
    site = start("--hang-timeout", "1")
    processes = site.server.processes()
    for process in processes:
        with suppress(psutil.AccessDenied):
            process.nice(
                -15
            )  # Otherwise a busy machine might delay them as long as this test does.
    with site.neighbours():
        began = time.monotonic()
        with stopped(*processes):
            time.sleep(2.5)
            processes[0].resume()
            resumed_at = time.monotonic()
            time.sleep(0.1)  # The supervisor checks before the others can update their heartbeats.
        if time.monotonic() - resumed_at > 0.5:
            pytest.skip("this machine did not resume the others in time")
        notes.happened(f"all processes were stopped for {time.monotonic() - began:.1f} s")
    assert site.server.processes() == processes


def is_free(port: int) -> bool:
    """Whether a port can be bound. A process that dies keeps its sockets longer than its memory."""
    with suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


@row("Supervisor killed", *ALL)
def test_no_process_outlives_a_killed_supervisor(
    start: Start, notes: Notes, tmp_path: Path
) -> None:
    site = start("--commands", "lab.commands", env={"MARK": str(tmp_path)})
    clients = [site.client() for _ in range(20)]
    used = {worker: worker.cpu_times().user for worker in site.server.workers()}
    for client in clients[:5]:
        client.send(b"SPIN\n")
    until(
        lambda: any(worker.cpu_times().user > used[worker] + 0.3 for worker in used),
        "a worker is computing",
    )
    for process in site.server.agents() + site.server.workers()[1:]:
        process.suspend()
    psutil.Process(site.server.pid).kill()
    until(
        lambda: not left_over(tmp_path) and is_free(site.server.port),
        "no process is left",
        2 * PATIENCE,
    )
    notes.happened("all processes ended, and the port is free")
    for client in clients:
        client.sock.close()


@row("SIGTERM under load", *ALL)
def test_the_lines_of_a_thousand_clients_are_answered_at_a_stop(
    start: Start, notes: Notes, tmp_path: Path
) -> None:
    site, drawn = start("--drain-timeout", "30", env={"MARK": str(tmp_path)}), random.Random(SEED)
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        clients = [stack.enter_context(site.client()) for _ in range(1000)]
        until(lambda: sum(site.clients()) == 1000, "all clients are connected")
        lines = [drawn.randint(1, 50) for _ in clients]
        for client, count in zip(clients, lines, strict=True):
            client.send(b"WHY\n" * count)
        site.server.send_signal(signal.SIGTERM)
        outputs = list(pool.map(Client.rest, clients))
    assert [len(text) / len(b"42\n") for text in outputs] == lines
    notes.happened(f"{len(outputs)} clients got {sum(lines)} replies, then a clean close")
    assert site.server.exit_code() == 0
    assert not left_over(tmp_path)


@row("Second SIGTERM", *SEVERAL, quick=None)
def test_a_second_signal_ends_the_server_now(start: Start, notes: Notes, tmp_path: Path) -> None:
    site = start("--commands", "lab.commands", "--drain-timeout", "60", env={"MARK": str(tmp_path)})
    with site.client() as client:
        client.send(b"SPIN\n")
        site.server.send_signal(signal.SIGTERM)
        site.server.wait_for("server.draining")
        time.sleep(0.2)  # Sooner, it would count as forwarded.
        assert site.server.stop() == 1
    notes.happened(site.server.events("server.forced")[0]["message"])
    assert not left_over(tmp_path)


@row(
    "SIGTERM during a reload or a worker's restart",
    *SEVERAL,
    values={
        "a reload": lambda site: site.server.send_signal(signal.SIGHUP),
        "a respawn": lambda site: [worker.kill() for worker in site.server.workers()],
        "both": lambda site: [
            site.server.send_signal(signal.SIGHUP),
            site.server.agents()[0].kill(),
        ],
    },
    quick=None,
)
def test_a_stop_during_a_reload_or_respawn_is_a_stop(
    start: Start, notes: Notes, kind: Callable[[Site], object], tmp_path: Path
) -> None:
    site, moment = start(env={"MARK": str(tmp_path)}), random.Random(SEED).random() / 10
    site.server.wait_for("worker.ready", site.variant.workers)
    begun = len(site.server.events())
    kind(site)
    until(
        lambda: site.server.events("server.reloading") + site.server.events("worker.died"),
        "the reload or respawn is in progress",
    )
    time.sleep(moment)
    assert site.server.stop() == 0
    since = [event["event.action"] for event in site.server.events()[begun:]]
    ready = since[: since.index("server.draining")].count("worker.ready")
    notes.happened(
        f"GSERVER_FAULT_SEED={SEED}: {moment:.2f} s later, {ready} of the new workers were ready"
    )
    assert ready < site.variant.workers
    assert not left_over(tmp_path)
    assert site.server.events()[-1]["event.action"] == "server.stopped"


@row("SIGTERM just after a reload, in a cluster", *PLAIN, quick=None)
def test_a_stop_after_a_reload_leaves_the_cluster(
    tmp_path: Path, notes: Notes, variant: Variant
) -> None:
    """The agent that the reload ends does not know of the stop, and ends while workers drain."""
    with Redis(tmp_path) as redis:
        for number in range(6):
            with Running("--redis-url", redis.url, "--workers", str(variant.workers)) as server:
                until(redis.members, "the server reports to Redis")
                server.send_signal(signal.SIGHUP)
                server.wait_for("server.reloaded")
                agents = server.agents()
                time.sleep(number / 200)
                assert server.stop() == 0
                outputs = [event["event.action"] for event in server.events()]
                assert outputs.index("server.reloaded") < outputs.index("server.draining")
                assert redis.members() == {}, f"{number * 5} ms later"
        notes.happened(f"stopped up to {number * 5} ms after the reload, with {len(agents)} agents")


@row("Reloads while clients connect", *ALL, quick=ALL[0])
def test_every_client_that_connects_during_20_reloads_gets_a_reply(
    start: Start, notes: Notes
) -> None:
    site = start()
    is_over, counts = Event(), [0] * 4

    def connect(number: int) -> None:
        while not is_over.is_set():
            with site.client() as client:
                assert client.ask(b"WHY") == b"42"
            counts[number] += 1

    with site.neighbours(), ThreadPoolExecutor(4) as pool, ExitStack() as stack:
        stack.callback(is_over.set)
        site.may_lose = site.variant.is_tls
        connecting = [pool.submit(connect, number) for number in range(4)]
        for number in range(1, 21):
            site.server.send_signal(signal.SIGHUP)
            site.server.wait_for("server.reloaded", number)
        until(
            lambda: sum(counts) >= CONNECTS or any(each.done() for each in connecting),
            "many clients have connected",
            20 * LIMIT,
        )
        is_over.set()
        for each in connecting:
            each.result()
        notes.happened(f"20 reloads, {sum(counts)} connections, all answered")
        assert sum(counts) >= CONNECTS
        assert not site.server.events("worker.died")
        site.await_others()


#: Of 10,000 clients, how many do what.
CROWD = {"pipelined": 1000, "partial": 300, "busy": 200, "slow": 100, "idle": 8399, "watcher": 1}
BATCH = 250


@row("Reloads and upgrades with 10,000 clients", Variant(1), Variant(2), quick=None)
def test_20_reloads_and_5_upgrades_lose_no_client_and_no_reply(
    variant: Variant, tmp_path: Path, notes: Notes
) -> None:
    (tmp_path / "extra.py").write_text(reload_load.MODULE)
    installed = Installed(tmp_path)
    options = ("--server-id", "here", "--commands", "extra", "--max-clients", "15000")
    workers = ("--workers", str(variant.workers))
    with installed.start(*options, *workers, cwd=tmp_path) as server:
        crowd = [f"{kind}={number}" for kind, number in CROWD.items()]
        load = Child("lab.reload_load", server.port, "here", *crowd)
        for number in range(1, 26):
            if number % 5 == 0:
                installed.set_version(f"1.0.{number}")
            server.send_signal(signal.SIGHUP)
            server.wait_for("server.reloaded", number, 5 * LIMIT)
        figures = load.result()
        upgrades = len(server.events("server.upgraded"))
        moved = sum(each["gserver.clients"] for each in server.events("worker.handed_over"))
        notes.happened(
            f"20 reloads, {upgrades} upgrades, {moved} handovers of clients at once,"
            f" {figures['replies']} replies"
        )
        assert upgrades == 5
        assert (figures["lost"], figures["wrong"], figures["missing"]) == (0, 0, 0)
        assert figures["who_least"] == 10_000
        assert figures["who_most"] <= 10_000 + BATCH
        assert moved > 20 * 10_000
        assert not server.events("worker.died") + server.events("worker.cut_off")
        notes.measured("most by which WHO was too high", figures["who_most"] - 10_000, "clients")


@row(
    "Signal storms, with all signals ignored and blocked at the start",
    Variant(3),
    Variant(3, True),
    quick=None,
)
def test_signals_in_any_order_to_any_process_are_survived(start: Start, notes: Notes) -> None:
    words = [program("env"), "--ignore-signal", "--block-signal", *GSERVER, "serve", "--port", "0"]
    site, drawn = start(command=words), random.Random(SEED)
    count = 0
    with site.neighbours():
        site.may_lose = True
        end = time.monotonic() + 3
        while time.monotonic() < end:
            for process in site.server.workers() + site.server.agents():
                with suppress(psutil.NoSuchProcess):  # A reload may have ended it.
                    process.send_signal(drawn.choice(FOR_ALL))
            site.server.send_signal(drawn.choice(FOR_SUPERVISOR))
            count += site.variant.workers + 2
            time.sleep(drawn.random() / 20)
        notes.happened(f"GSERVER_FAULT_SEED={SEED}: {count} signals")
        reloads = len(site.server.events("server.reloading"))
        assert reloads
        until(
            lambda: site.server.events()[-1]["event.action"] == "agent.ready",
            "the last reload has ended",
        )
    assert not site.server.events("worker.died") + site.server.events("agent.died")
    assert site.server.stop() == 0


@row("Port closed from outside", *ALL)
def test_a_port_that_is_closed_from_outside_is_opened_again(start: Start, notes: Notes) -> None:
    site = start("--port", str(free_port()))
    processes, site.may_log_errors = site.server.processes(), True
    with site.neighbours():
        site.may_lose = True
        for number, port in enumerate((site.server.port, site.server.admin_port()), 1):
            killed = subprocess.run(
                [program("ss"), "-Ktln", f"sport = :{port}"], check=True, capture_output=True
            )
            if b"LISTEN" not in killed.stdout:
                unavailable(f"closing a socket takes root and kernel support: {killed.stderr!r}")
            notes.happened(site.server.wait_for("server.port_closed", number)["message"])
            until(lambda: get(site.server, "/readyz")[0] == 200, "both ports are open")
    assert site.server.processes() == processes


@row("Port taken", *PLAIN, quick=None)
def test_a_second_server_on_the_port_fails_and_does_no_harm(start: Start, notes: Notes) -> None:
    site = start()
    with site.neighbours():
        other = gserver("--port", str(site.server.port))
        notes.happened(other.stderr)
        assert other.returncode == 1
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", site.server.port))
