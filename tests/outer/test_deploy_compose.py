"""deploy/compose.yaml: docker-compose accepts it, and all that it starts works together.

There is no Docker here. Its parts run as processes with the commands and variables of the file, at
their addresses, in a network namespace.
"""

import csv
import io
import json
import os
import re
import secrets
import shlex
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.host import Host
from lab.packages import package
from lab.running import GSERVER, LIMIT, ROOT, Client, environment, program, unavailable, until

DEPLOY = ROOT / "deploy"
FILE = DEPLOY / "compose.yaml"
TOKEN = "a-token-of-the-test"
SERVERS = ("server-1", "server-2", "server-3")


def composed() -> dict[str, Any]:
    """The file as docker-compose reads it."""
    done = subprocess.run(
        [program("docker-compose"), "--file", str(FILE), "config"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    found: dict[str, Any] = package("yaml").safe_load(done.stdout)
    return found


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = composed()["services"]
    return found


def address(service: dict[str, Any]) -> str:
    return str(service["networks"]["gserver"]["ipv4_address"])


def test_addresses_and_files_are_those_of_the_other_files(services: dict[str, Any]) -> None:
    servers = [address(services[name]) for name in SERVERS]
    text = (DEPLOY / "haproxy/haproxy.cfg").read_text()
    balanced = re.findall(r"^ +server gs\d ([\d.]+):4242", text, re.M)
    scraped = re.findall(r"- ([\d.]+):4243", (DEPLOY / "prometheus/prometheus.yml").read_text())
    assert servers == balanced == scraped
    datasource = (DEPLOY / "compose/grafana/datasources/prometheus.yaml").read_text()
    assert f"http://{address(services['prometheus'])}:9090" in datasource
    build = services["server-1"]["build"]
    assert (Path(build["context"]) / build["dockerfile"]).samefile(DEPLOY / "docker/Dockerfile")
    mounted = [volume for each in services.values() for volume in each.get("volumes", ())]
    for volume in mounted:
        source = Path(volume.split(":")[0])
        is_there = source.exists() or source.name in ("prometheus", "gserver.token")
        assert is_there, volume
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana" / Path(home).name).exists()
    published = [port for each in services.values() for port in each.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in published), "loopback only"


@contextmanager
def namespace(addresses: list[str]) -> Iterator[Host]:
    """A host of its own with all these addresses."""
    if os.geteuid() != 0:
        unavailable("network namespaces need root")
    name = f"gserver-compose-{secrets.token_hex(4)}"
    ip = program("ip")
    subprocess.run([ip, "netns", "add", name], check=True)
    try:
        subprocess.run([ip, "-n", name, "link", "set", "lo", "up"], check=True)
        for each in addresses:
            subprocess.run(
                [ip, "-n", name, "address", "add", f"{each}/32", "dev", "lo"], check=True
            )
        yield Host(name, "127.0.0.1")
    finally:
        subprocess.run([ip, "netns", "delete", name], check=True)


class Scene(ExitStack[None]):
    """All services as processes."""

    def __init__(self, folder: Path, services: dict[str, Any], host: Host) -> None:
        super().__init__()
        self._folder, self._services, self._host = folder, services, host
        self._prometheus = f"{address(services['prometheus'])}:9090"
        self.balancer = address(services["haproxy"])

    def start(self) -> None:
        """Start all of them."""
        folder, services = self._folder, self._services
        (folder / "gserver.token").write_text(TOKEN)
        for name in ("redis-1", "redis-2"):
            words = self.command(name)
            self.run([program(words[0]), *words[1:], "--bind", address(services[name])])
        for name in SERVERS:
            own = dict(services[name]["environment"])
            # In their containers, they listen on all addresses, and on the ports of the image.
            own |= {"GSERVER_HOST": address(services[name]), "GSERVER_ADMIN_PORT": "4243"}
            own |= {"GSERVER_ADMIN_HOST": own["GSERVER_HOST"]}
            assert f"/gserver.token:{own['GSERVER_ADMIN_TOKEN_FILE']}:ro" in str(services[name])
            own |= {"GSERVER_ADMIN_TOKEN_FILE": str(folder / "gserver.token")}
            self.run([*GSERVER, "serve"], env=environment(**own))
        assert self.command("haproxy") == ["haproxy", "-f", "/etc/haproxy/haproxy.cfg"]
        assert services["haproxy"]["environment"] == {"HAPROXY_LISTEN": "0.0.0.0"}
        # HAProxy's own address decides whom the servers trust.
        source, copy = f"default-server source {self.balancer} ", folder / "haproxy.cfg"
        text = (DEPLOY / "haproxy/haproxy.cfg").read_text()
        copy.write_text(text.replace("default-server ", source))
        own = environment(HAPROXY_LISTEN=self.balancer)
        self.run([program("haproxy"), "-db", "-f", str(copy)], env=own)
        for name in ("prometheus.yml", "gserver.rules.yml"):
            (folder / name).write_text((DEPLOY / "prometheus" / name).read_text())
        self.run(
            [
                program("prometheus"),
                *[
                    word.replace("/etc/prometheus", str(folder)).replace(
                        "=/prometheus", f"={folder}/data"
                    )
                    for word in self.command("prometheus")
                ],
                f"--web.listen-address={self._prometheus}",
            ]
        )

    def command(self, name: str) -> list[str]:
        command = self._services[name]["command"]
        return shlex.split(command) if isinstance(command, str) else list(command)

    def run(self, words: list[str], **more: Any) -> None:
        with self._host.inside(), (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, cwd=self._folder, **more)

        def end() -> None:
            process.terminate()
            process.wait(LIMIT)

        self.callback(end)

    def client(self, source: str) -> Client:
        """A client of HAProxy."""
        assert "127.0.0.1:4242:4242/tcp" in self._services["haproxy"]["ports"]
        with self._host.inside():
            return self.enter_context(Client(4242, self.balancer, source=source))

    def _get(self, url: str) -> str:
        """A page; "" before anybody serves it."""
        try:
            with self._host.inside():
                answer = urllib.request.urlopen(url, timeout=LIMIT)
        except urllib.error.URLError:
            return ""
        with answer:
            return str(answer.read().decode())

    def ask(self, query: str) -> list[Any]:
        """What Prometheus replies; nothing before it is ready."""
        page = self._get(f"http://{self._prometheus}/api/v1/query?query={query}")
        found: list[Any] = json.loads(page)["data"]["result"] if page else []
        return found

    def used(self) -> list[str]:
        """The servers that HAProxy uses because of health checks, not because there was none."""
        rows = csv.DictReader(io.StringIO(self._get(f"http://{self.balancer}:8404/;csv")))
        good = ("UP", "L7OK")
        return [row["svname"] for row in rows if (row["status"], row["check_status"]) == good]


def test_all_that_it_starts_works_together(tmp_path: Path, services: dict[str, Any]) -> None:
    used = [address(each) for each in services.values() if "networks" in each]
    with namespace(used) as host, Scene(tmp_path, services, host) as scene:
        scene.start()
        until(lambda: len(scene.used()) == len(SERVERS), "HAProxy uses all servers")
        clients = [scene.client(f"127.0.0.{number}") for number in range(20, 26)]
        assert {client.ask(b"WHERE").decode() for client in clients} <= set(SERVERS)
        until(lambda: clients[0].who() == len(clients), "all servers count all clients")
        listed = subprocess.run(
            ["ip", "netns", "exec", host.name, *GSERVER, "clients", "--json"]
            + [word for name in SERVERS for word in ("--admin", f"{address(services[name])}:4243")],
            capture_output=True,
            text=True,
            env=environment(GSERVER_ADMIN_TOKEN=TOKEN),
            check=True,
        ).stdout
        for number in range(20, 26):
            assert f'"127.0.0.{number}"' in listed, "the servers know the clients' addresses"
        until(lambda: len(scene.ask("gserver_ready==1")) == 3, "Prometheus scrapes all", LIMIT)
        all_know_all = "gserver_cluster_servers==3"
        until(lambda: len(scene.ask(all_know_all)) == 3, "the last scrapes", 2 * LIMIT)
