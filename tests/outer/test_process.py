"""Relations between processes: lifetimes, secrets, environments, and limits of open files."""

import mmap
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from lab.admin import get
from lab.certificates import make_certificates
from lab.running import GSERVER, LIMIT, ROOT, Running, left_over, limited, program, until
from lab.tls_client import trust

MODULE = """
import os
from gserver.commands import command

@command("PROGRAM")
def program(request):
    return os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", "exec sleep 60 >/dev/null 2>&1")
"""


@contextmanager
def nothing_left(folder: Path, limit: float) -> Iterator[None]:
    """All processes that were started for this folder end within the limit after the body.

    The rest are killed.
    """
    try:
        yield
        until(lambda: not left_over(folder), "no process is left", limit)
    finally:
        for process in left_over(folder):
            process.kill()


def test_no_process_outlives_a_supervisor_killed_during_its_start(tmp_path: Path) -> None:
    for step in range(8):
        options = ("--workers", "2", "--statsd-host", "127.0.0.1")
        with Running(*options, env={"MARK": str(tmp_path)}, wait=False) as server:
            time.sleep(0.05 * step)  # The test varies this moment.
            # On a busy machine a child takes a while to check for its parent.
            with nothing_left(tmp_path, LIMIT):
                server.process.kill()


def test_a_program_started_by_a_command_does_not_keep_the_port(tmp_path: Path) -> None:
    (tmp_path / "extra.py").write_text(MODULE)
    with Running("--commands", "extra", cwd=tmp_path) as server, server.client() as client:
        other = psutil.Process(int(client.ask(b"PROGRAM")))
        try:
            until(lambda: other.name() == "sleep", "the program runs")
            assert server.stop() == 0
            with Running("--port", str(server.port)) as next_server:
                assert next_server.who() == 1
        finally:
            other.kill()


def test_a_program_started_by_a_command_cannot_read_the_instructions(tmp_path: Path) -> None:
    (tmp_path / "spy.py").write_text(
        "import subprocess\nfrom gserver.commands import command\n"
        "@command('SPY')\ndef spy(request):\n"
        "    return len(subprocess.check_output(['cat', '/proc/self/fd/0']))\n"
    )
    with Running("--commands", "spy", cwd=tmp_path) as server, server.client() as client:
        assert client.ask(b"SPY") == b"0"


REDIS_PASSWORD, ADMIN_TOKEN = "password-of-redis", "token-of-the-admin-port"
SECRETS = {
    "GSERVER_REDIS_URL": f"redis://someone:{REDIS_PASSWORD}@127.0.0.1:1",
    "REDIS_URL": f"redis://someone:{REDIS_PASSWORD}@127.0.0.1:2",
    "GSERVER_ADMIN_TOKEN": ADMIN_TOKEN,
}
ENVIRONMENT = """
import subprocess
from gserver.commands import command

@command("ENVIRONMENT")
def environment(request):
    return ascii(subprocess.check_output(["env", "-0"]).decode())
"""


def memory_of(process: psutil.Process) -> bytes:
    """All writable memory of a process: heap, stacks, and anonymous or private mappings."""
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    found = []
    with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as mem:
        for line in maps.splitlines():
            span, access, *_ = line.split()
            begin, end = (int(text, 16) for text in span.split("-"))
            # From glibc 2.42 on, the guard pages of a stack are in its mapping.
            for page in range(begin, end, mmap.PAGESIZE) if access.startswith("rw") else ():
                mem.seek(page)
                with suppress(OSError):
                    found.append(mem.read(mmap.PAGESIZE))
    return b"".join(found)


def test_each_process_has_only_the_secrets_that_it_needs(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    (tmp_path / "extra.py").write_text(ENVIRONMENT)
    key = (tmp_path / "server.key").read_bytes()
    key_line = key.splitlines()[1]
    options = ("--tls-cert", "server.pem", "--tls-key", "server.key", "--admin-port", "0")
    with Running(*options, "--commands", "extra", cwd=tmp_path, env=SECRETS) as server:
        server.wait_for("agent.ready")
        [worker], [agent] = server.workers(), server.agents()
        memory = {"worker": memory_of(worker), "agent": memory_of(agent)}
        held = {
            (role, name): secret in memory[role]
            for role in memory
            for name, secret in (
                ("key", key_line),
                ("Redis password", REDIS_PASSWORD.encode()),
                ("admin token", ADMIN_TOKEN.encode()),
            )
        }
        assert held == {
            ("worker", "key"): True,
            ("worker", "Redis password"): False,
            ("worker", "admin token"): False,
            ("agent", "key"): False,
            ("agent", "Redis password"): True,
            ("agent", "admin token"): True,
        }
        for child in (worker, agent):
            assert not SECRETS.keys() & child.environ().keys()
        with server.client(context=trust(tmp_path)) as client:
            seen = client.ask(b"ENVIRONMENT").decode()
        assert "PATH=" in seen
        assert [name for name in SECRETS if name in seen] == []
        token = f"Bearer {ADMIN_TOKEN}"
        assert get(server, "/status.json", Authorization=token)[0] == 200
        assert get(server, "/status.json")[0] == 401


@pytest.mark.parametrize("operators", [None, "", "modules", "modules:/no/such/folder"])
@pytest.mark.parametrize("script", [[str(ROOT / "bin/gserver")], GSERVER])
def test_programs_of_handlers_get_the_operators_pythonpath(
    tmp_path: Path, script: list[str], operators: str | None
) -> None:
    (tmp_path / "modules").mkdir()
    folder = "modules" if operators and operators.startswith("modules") else "."
    (tmp_path / folder / "extra.py").write_text(ENVIRONMENT)
    if script is GSERVER:  # Without a script, the operator must name the package's folder.
        operators = ":".join(filter(None, (str(ROOT), operators)))
    setting = ["-u", "PYTHONPATH"] if operators is None else [f"PYTHONPATH={operators}"]
    command = [program("env"), *setting, *script, "serve", "--port", "0"]
    with (
        Running("--commands", "extra", command=command, cwd=tmp_path) as server,
        server.client() as client,
    ):
        seen = client.ask(b"ENVIRONMENT").decode().strip("'").split("\\x00")
        found = [text for text in seen if text.startswith("PYTHONPATH=")]
        assert found == ([] if operators is None else [f"PYTHONPATH={operators}"])


def test_a_child_has_no_option_arguments_and_leads_a_process_group(tmp_path: Path) -> None:
    with Running("--server-id", "an-id-to-look-for", "--workers", "2") as server:
        server.wait_for("worker.ready", 2)
        for slot, worker in enumerate(server.workers()):
            package = str(ROOT / "gserver")
            assert worker.cmdline()[1:] == ["-P", package, "child", "worker", str(slot)]
            assert "an-id-to-look-for" not in "".join(worker.environ().values())
            assert os.getpgid(worker.pid) == worker.pid


FOR_THE_SUPERVISOR = [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", FOR_THE_SUPERVISOR)
def test_a_signal_for_the_supervisor_has_no_effect_on_its_children(number: signal.Signals) -> None:
    with Running("--admin-port", "0") as server, server.client() as client:
        server.wait_for("agent.ready")
        children = [*server.workers(), *server.agents()]
        assert client.who() == 1
        for child in children:
            child.send_signal(number)
        for _ in range(20):
            with server.client() as other:
                assert other.who() == 2
            until(lambda: client.who() == 1, "the client has left")
        assert get(server, "/readyz")[0] == 200
        assert [*server.workers(), *server.agents()] == children
        assert server.stop() == 0
        assert not server.events("worker.died")


@pytest.mark.parametrize("number", FOR_THE_SUPERVISOR)
def test_a_signal_for_the_supervisor_has_no_effect_on_a_starting_worker(
    number: signal.Signals,
) -> None:
    with Running() as server:
        old = server.workers()
        old[0].kill()
        [new] = until(
            lambda: [worker for worker in server.workers() if worker not in old],
            "another worker starts",
        )
        new.send_signal(number)
        server.wait_for("worker.ready", 2)
        assert server.workers() == [new]
        assert server.who() == 1
        assert server.stop() == 0
        assert server.stderr == ""


def test_a_worker_raises_its_descriptor_limit_to_the_hard_limit() -> None:
    command = [program("prlimit"), "--nofile=100:500", *limited(0)[2:]]
    with Running(command=command) as server:
        assert server.workers()[0].rlimit(psutil.RLIMIT_NOFILE) == (500, 500)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_default_max_clients_is_lowered_to_fit_the_descriptor_limit(workers: int) -> None:
    with Running("--workers", str(workers), command=limited(100)) as server:
        assert server.events("server.listening")[0]["gserver.max_clients"] == workers * 36


def test_an_explicit_max_clients_that_just_fits_is_used() -> None:
    with Running("--max-clients", "36", command=limited(100)) as server:
        assert server.events("server.listening")[0]["gserver.max_clients"] == 36


@pytest.mark.parametrize(
    ("options", "files"), [(("--max-clients", "37"), 100), (("--workers", "2"), 64)]
)
def test_a_max_clients_above_the_descriptor_limit_exits_with_2(
    options: tuple[str, ...], files: int
) -> None:
    with Running(*options, command=limited(files), wait=False) as server:
        assert server.exit_code() == 2
        assert len(server.errors) == 1
        assert "--max-clients" in server.stderr
        assert f"{files} open files per process allow" in server.stderr
        assert server.lines == []
