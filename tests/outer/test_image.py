"""The container image, built from deploy/docker/Dockerfile and started like an operator does."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gserver import __version__
from lab.documents import DEPLOYING
from lab.image import BASE, Engine, copy_context
from lab.netns import Network
from lab.running import ROOT, Client, until

IMAGE = "localhost/gserver"
#: The modules that install packages.
INSTALLERS = ["pip", "setuptools", "wheel", "ensurepip"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that has the image."""
    with Engine() as running:
        running.make_base()
        running.build(context(tmp_path_factory), IMAGE)
        yield running


def context(factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp("context")
    copy_context(folder)
    return folder


def test_a_container_serves_read_only_as_process_1_and_drains(engine: Engine) -> None:
    hardened = ["--read-only", "--read-only-tmpfs=false", "--cap-drop", "all"]
    hardened += ["--security-opt", "no-new-privileges"]
    with Network(2) as network, engine.serving(IMAGE, network.hosts[0], *hardened) as container:
        server = container.server
        assert server.events("server.listening")[0]["server.address"] == "0.0.0.0"
        with network.hosts[1].inside():
            client = Client(server.port, network.hosts[0].address)
        with client:
            assert [client.ask(word) for word in (b"WHO", b"WHY")] == [b"1", b"42"]
            assert re.fullmatch(rb"[0-9a-f-]{36}", client.ask(b"WHERE"))
        until(container.is_healthy, "the health check succeeds")

        first = psutil.Process(container.first_process())
        for process in (first, *first.children(recursive=True)):
            assert_is_confined(process)
        assert f"\nNSpid:\t{first.pid}\t1\n" in Path(f"/proc/{first.pid}/status").read_text()
        assert container.run("touch", "/opt/gserver/file", "/tmp/file").returncode != 0

        container.run("sh", "-c", "(sleep 60 & sleep 60 &) >/dev/null 2>&1")
        orphans = [each for each in first.children() if each.name() == "sleep"]
        assert len(orphans) == 2
        for orphan in orphans:
            orphan.kill()
        until(lambda: not any(each.is_running() for each in orphans), "the orphans are reaped")

        assert container.stop() == 0
        assert server.events("server.stopped")
        assert not server.events("worker.died")
        assert server.stderr == ""


def assert_is_confined(process: psutil.Process) -> None:
    status = Path(f"/proc/{process.pid}/status").read_text()
    for name in ("Uid", "Gid"):
        assert f"\n{name}:\t65532\t65532\t65532\t65532\n" in status
    for name in ("CapEff", "CapBnd"):
        assert f"\n{name}:\t0000000000000000\n" in status
    mounts = [line.split() for line in Path(f"/proc/{process.pid}/mounts").read_text().splitlines()]
    [options] = [mount[3].split(",") for mount in mounts if mount[1] == "/"]
    assert "ro" in options
    assert "/tmp" not in [mount[1] for mount in mounts]


@pytest.mark.parametrize(
    ("variable", "is_healthy"),
    [("GSERVER_ADMIN_PORT=off", False), ("REDIS_URL=redis://127.0.0.1:1", True)],
    ids=["nothing answers", "Redis is away"],
)
def test_the_health_check_fails_only_if_the_server_does_not_live(
    engine: Engine, variable: str, is_healthy: bool
) -> None:
    with (
        Network(1) as network,
        engine.serving(IMAGE, network.hosts[0], "--env", variable) as container,
    ):
        container.server.wait_for("server.listening")
        assert container.is_healthy() is is_healthy


def test_the_labels_say_what_the_program_says(engine: Engine) -> None:
    config = engine.inspect(IMAGE)["Config"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "org.opencontainers.image"
    ours = {name: text for name, text in config["Labels"].items() if name.startswith(prefix)}
    assert ours == {
        f"{prefix}.title": project["name"],
        f"{prefix}.description": project["description"],
        f"{prefix}.version": __version__,
    }
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert list(config["ExposedPorts"]) == ["4242/tcp"]


def test_an_image_with_the_version_of_another_program_is_not_built(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = ["--build-arg", "VERSION=0.0.0"]
    built = engine.build(context(tmp_path_factory), "localhost/other", *other, check=False)
    assert built.returncode != 0
    assert 'test "$(bin/gserver --version)"' in built.stderr


def test_nothing_but_the_program_is_in_the_image(engine: Engine) -> None:
    listed = engine.inside(IMAGE, "find", "/opt/gserver", "-type", "f", "-printf", "%m %P\n")
    modes = {name: mode for mode, name in (line.split(" ", 1) for line in listed.splitlines())}
    compiled = {name for name in modes if name.endswith(".pyc")}
    programs = {"bin/setup", "bin/gserver"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "gserver").rglob("*.*")}
    sources = {name for name in sources if "__pycache__" not in name}
    assert {name for name in modes if not name.startswith(".venv/")} - compiled == {
        "requirements.lock",
        "requirements.txt",
        *programs,
        *sources,
    }
    assert not [name for name in compiled if "removed" in name]
    assert "gserver/serve/__pycache__/worker.cpython-313.pyc" in compiled
    for name, mode in modes.items():
        is_program = name in programs or name.startswith(".venv/bin/")
        assert mode in (("755", "644") if is_program else ("644", "755")), name
    assert not [name for name in modes if "/tests/" in name]


@pytest.mark.parametrize("python", ["python3", "/opt/gserver/.venv/bin/python"])
def test_the_image_cannot_install_packages(python: str, engine: Engine) -> None:
    look = "import sys\nfrom importlib.util import find_spec\n"
    look += "print([name for name in sys.argv[1:] if find_spec(name)])"
    assert "pip" in engine.inside(BASE, "python3", "-c", look, *INSTALLERS)
    assert engine.inside(IMAGE, python, "-c", look, *INSTALLERS) == "[]\n"
    assert engine.inside(IMAGE, "sh", "-c", "command -v pip pip3 || true") == ""


def test_gserver_adds_to_its_base_what_the_page_says(engine: Engine) -> None:
    documented = re.search(r"gserver and its packages add (\d+) MB", " ".join(DEPLOYING.split()))
    assert documented
    whole, base = (engine.inspect(name)["Size"] / 1e6 for name in (IMAGE, BASE))
    assert whole - base == pytest.approx(int(documented[1]), abs=4)
