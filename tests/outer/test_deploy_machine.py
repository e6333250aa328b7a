"""deploy/: its files are valid and consistent with the code, and a server runs with them."""

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gserver.config import OPTIONS, environment_names, flag
from lab import operator_rules
from lab.booted import UNITS, Booted
from lab.certificates import make_certificates
from lab.documents import DEPLOYING
from lab.packages import package
from lab.redises import free_port
from lab.running import GSERVER, LIMIT, PATIENCE, ROOT, Client, Running, program, until

DEPLOY = ROOT / "deploy"
SECURITY = (ROOT / "docs/security.md").read_text()


def unit(name: str) -> dict[str, dict[str, str]]:
    """A unit's sections and settings; repeated settings are joined."""
    found: dict[str, dict[str, str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section[key] = f"{section[key]} {value}" if key in section else value
    return found


#: Flags of systemctl, groupadd, docker, pip and kubectl.
FLAGS_OF_OTHERS = {
    "--now",
    "--kill-who",
    "--signal",
    "--file",
    "--tag",
    "--rm",
    "--read-only",
    "--publish",
}
FLAGS_OF_OTHERS |= {"--cert", "--key", "--build", "--detach", "--kustomize", "--locked"}
FLAGS_OF_OTHERS |= {
    "--save",
    "--appendonly",
    "--maxmemory",
    "--maxmemory-policy",
    "--protected-mode",
    "--config",
    "--storage",
}
FLAGS_OF_OTHERS |= {"--build-arg", "--from", "--quiet", "--yes", "--root-user-action"}
#: Variables of gserver that are not options of `serve`.
FLAGS_OF_OTHERS |= {"--version"}
FLAGS_OF_OTHERS |= {"--system", "--interval", "--timeout", "--start-period", "--from-file"}


def manifests() -> dict[str, Any]:
    """The objects of the manifest by kind."""
    return by_kind((DEPLOY / "kubernetes/base/gserver.yaml").read_text())


def by_kind(text: str) -> dict[str, Any]:
    return {each["kind"]: each for each in package("yaml").safe_load_all(text)}


def container() -> dict[str, Any]:
    found: dict[str, Any] = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return found


# Names and times.


def test_every_option_and_variable_that_is_named_exists() -> None:
    options = {flag(name) for name in OPTIONS}
    variables = {name for field in OPTIONS for name in environment_names(field)} | {
        "GSERVER_SERVER",
        "GSERVER_ADMIN",
    }
    named = set()
    for path in (path for path in DEPLOY.rglob("*") if path.is_file()):
        text = path.read_text()
        named |= (used := set(re.findall(r"\bGSERVER_[A-Z_]+|\bREDIS_URL", text)))
        assert used <= variables, path
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - FLAGS_OF_OTHERS <= options, path
    assert {"GSERVER_DRAIN_DELAY", "GSERVER_DRAIN_TIMEOUT"} <= named


def test_a_service_has_time_for_a_lame_duck_before_it_is_killed() -> None:
    service = unit("gserver.service")["Service"]
    documented = dict(pair.split("=") for pair in service["Environment"].split())
    delay, timeout = (
        float(documented["GSERVER_DRAIN_DELAY"]),
        float(documented["GSERVER_DRAIN_TIMEOUT"]),
    )
    assert delay + 2 * timeout < float(service["TimeoutStopSec"])


def test_a_pod_has_time_for_a_lame_duck_before_it_is_killed() -> None:
    values = {each["name"]: each.get("value") for each in container()["env"]}
    delay, timeout = float(values["GSERVER_DRAIN_DELAY"]), float(values["GSERVER_DRAIN_TIMEOUT"])
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    assert delay + 2 * timeout < pod["terminationGracePeriodSeconds"]
    readiness = container()["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] < delay, (
        "Kubernetes knows that the pod is unready before the port closes"
    )


# systemd.


def test_the_units_are_valid_and_reach_the_documented_score(tmp_path: Path) -> None:
    for name in ("gserver.service", "gserver.socket"):
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(
            text.replace("/opt/gserver", str(ROOT))
        )  # systemd-analyze checks that the program exists.
    verified = subprocess.run(
        [program("systemd-analyze"), "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in verified.stderr.splitlines() if "gserver" in line]
    assert (verified.returncode, ours) == (0, [])
    score = subprocess.run(
        [
            program("systemd-analyze"),
            "security",
            "--offline=true",
            str(tmp_path / "gserver.service"),
        ],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = re.search(r"Overall exposure level for gserver.service: ([0-9.]+) OK", score)
    assert found, score
    documented = re.search(r"`systemd-analyze security` says ([0-9.]+) or less", DEPLOYING)
    assert documented
    assert float(found[1]) <= float(documented[1])


def await_restart(machine: Booted) -> None:
    """Wait until systemd has restarted the server once, and takes it for ready."""
    until(lambda: machine.show("gserver.service", "NRestarts") == "1", "it has been restarted")
    until(lambda: machine.show("gserver.service", "ActiveState") == "active", "it is ready")


def test_under_systemd_the_server_is_confined_reloads_restarts_and_stops(tmp_path: Path) -> None:
    port = free_port()
    variables = {
        "GSERVER_PORT": str(port),
        "GSERVER_WORKERS": "2",
        "GSERVER_ADMIN_PORT": str(free_port()),
    }
    with Booted(
        tmp_path, variables | {"GSERVER_DRAIN_DELAY": "0.3"}, service="RestartSec=100ms"
    ) as machine:
        machine.run("systemctl", "start", "gserver.service")
        assert (
            machine.show("gserver.service", "StatusText")
            == f"listening on 127.0.0.1:{port}, workers: 2"
        )
        main = machine.main_process()
        for process in (main, *main.children()):
            status = Path(f"/proc/{process.pid}/status").read_text()
            for line in (
                "Seccomp:\t2",
                "NoNewPrivs:\t1",
                "CapEff:\t0000000000000000",
                "CapBnd:\t0000000000000000",
            ):
                assert line in status
            assert not re.search(r"^Uid:.*\b0\b", status, re.M)
            mounts = Path(f"/proc/{process.pid}/mounts").read_text().splitlines()
            root = next(mount.split() for mount in reversed(mounts) if mount.split()[1] == "/")
            assert "ro" in root[3].split(",")

        with Client(port) as client:
            assert client.who() == 1
            machine.run("systemctl", "reload", "gserver.service")
            until(lambda: machine.events("server.reloaded"), "the server has reloaded")
            assert client.who() == 1
        url = f"http://127.0.0.1:{variables['GSERVER_ADMIN_PORT']}/status.json"
        with urllib.request.urlopen(url, timeout=LIMIT) as answer:
            processes = json.load(answer)["processes"]
        assert None not in {each[name] for each in processes for name in each}
        until(
            lambda: machine.show("gserver.service", "ActiveState") == "active",
            "systemd knows of the reload",
        )

        main.kill()
        await_restart(machine)
        with Client(port) as client:
            assert client.who() == 1
            machine.run("systemctl", "stop", "gserver.service")
            assert client.rest() == b""
        assert machine.show("gserver.service", "Result") == "success"
        assert len(machine.events("server.stopped")) == 1
        assert machine.events("worker.died") == [], "the signal affects only the supervisor"
        assert machine.errors.read_text() == ""


def test_under_systemd_a_socket_file_is_served_and_removed(tmp_path: Path) -> None:
    path = "/run/gserver/socket"
    variables = {"GSERVER_BIND": f"unix:{path}?mode=0666", "GSERVER_DRAIN_DELAY": "0"}
    with Booted(tmp_path, variables) as machine:
        machine.run("systemctl", "start", "gserver.service")
        assert machine.run("stat", "-c", "%a %F", path).stdout == "666 socket\n"
        words = ("/opt/venv/bin/python", "/opt/gserver/gserver", "ask", "--server")
        asked = machine.run(*words, f"unix:{path}")
        assert asked.stdout == "1\n"
        machine.run("systemctl", "stop", "gserver.service")
        assert machine.run("stat", path, check=False).returncode != 0


def test_under_systemd_a_hang_is_killed_and_a_bad_option_is_not_retried(tmp_path: Path) -> None:
    variables = {"GSERVER_PORT": str(free_port()), "GSERVER_DRAIN_DELAY": "0"}
    short = f"WatchdogSec={PATIENCE}\nTimeoutAbortSec=500ms\nRestartSec=100ms"
    with Booted(tmp_path, variables, service=short) as machine:
        machine.run("systemctl", "start", "gserver.service")
        machine.main_process().suspend()
        await_restart(machine)
        (tmp_path / "units/gserver.service.d/bad.conf").write_text(
            "[Service]\nEnvironment='GSERVER_WORKERS=a few'\n"
        )
        machine.run("systemctl", "daemon-reload")
        assert machine.run("systemctl", "restart", "gserver.service", check=False).returncode != 0
        assert machine.show("gserver.service", "ExecMainStatus") == "2"
        assert machine.show("gserver.service", "ActiveState") == "failed"
        assert "neither a number from 1 to 256 nor auto" in machine.errors.read_text()


def test_under_systemd_a_lame_duck_serves_and_its_socket_loses_no_client(tmp_path: Path) -> None:
    port = free_port()
    listen = f"ListenStream=\nListenStream=127.0.0.1:{port}"
    with Booted(tmp_path, {"GSERVER_DRAIN_DELAY": "0"}, socket=listen) as machine:
        machine.run("systemctl", "start", "gserver.socket")
        assert machine.show("gserver.service", "ActiveState") == "inactive"
        with Client(port) as client:
            assert client.who() == 1
            until(
                lambda: machine.show("gserver.service", "ActiveState") == "active",
                "the server has been started",
            )
            machine.run(
                "systemctl", "kill", "--kill-who=main", "--signal=SIGUSR2", "gserver.service"
            )
            until(
                lambda: machine.show("gserver.service", "ActiveState") == "deactivating",
                "the server is a lame duck",
            )
            until(lambda: machine.events("server.retiring"), "the server logs that it retires")
            with socket.create_connection(("127.0.0.1", port), LIMIT) as late:
                late.sendall(b"WHO\n")
                until(client.who, "the first client is still served")
                client.sock.close()
                assert late.recv(100) == b"1\n"
        until(
            lambda: len(machine.events("server.listening")) == 2,
            "the late client made systemd start it again",
        )
        assert len(machine.events("server.stopped")) == 1


def commented(*beginnings: str) -> str:
    """Commented lines of the unit, uncommented, as a drop-in."""
    lines = [
        line[1:]
        for line in (UNITS / "gserver.service").read_text().splitlines()
        if line.startswith("#")
    ]
    found = [line for line in lines if line.startswith(beginnings)]
    assert len(found) == len(beginnings)
    return "\n".join(["[Service]", *found])


def test_under_systemd_a_key_is_a_credential_or_a_group_readable_file(tmp_path: Path) -> None:
    port = free_port()
    pems = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        make_certificates(tmp_path / name)
        pems.append(
            "".join((tmp_path / name / f"server.{part}").read_text() for part in ("pem", "key"))
        )

    def is_served(pem: str) -> bool:
        return pem.startswith(ssl.get_server_certificate(("127.0.0.1", port), timeout=LIMIT))

    with Booted(tmp_path, {"GSERVER_PORT": str(port), "GSERVER_DRAIN_DELAY": "0"}) as machine:

        def put(pem: str, *options: str) -> None:
            """Install a file as root, where DynamicUser= and PrivateTmp= let the service look."""
            (tmp_path / "pem").write_text(pem)
            machine.run("install", *options, str(tmp_path / "pem"), "/opt/gserver.pem")

        def start_with(lines: str) -> None:
            lines = lines.replace("/etc/ssl/gserver.pem", "/opt/gserver.pem").replace(
                "=gserver-tls", "=adm"
            )
            (tmp_path / "units/gserver.service.d/tls.conf").write_text(lines)
            machine.run("systemctl", "daemon-reload")
            machine.run("systemctl", "restart", "gserver.service")

        def reload() -> None:
            before = len(machine.events("server.reloaded"))
            machine.run("systemctl", "reload", "gserver.service")
            until(
                lambda: len(machine.events("server.reloaded")) > before, "the server has reloaded"
            )

        put(pems[0], "-m", "600")
        start_with(commented("LoadCredential=", "Environment=GSERVER_TLS_CERT=%d/"))
        assert is_served(pems[0])
        put(pems[1], "-m", "600")
        reload()
        assert is_served(pems[0]), "the copy made by systemd stays until the next start"
        machine.run("systemctl", "restart", "gserver.service")
        assert is_served(pems[1])

        put(pems[0], "-m", "640", "-g", "adm")
        start_with(commented("SupplementaryGroups=", "Environment=GSERVER_TLS_CERT=/"))
        assert is_served(pems[0])
        put(pems[1], "-m", "640", "-g", "adm")
        reload()
        assert is_served(pems[1])
        put("no certificate", "-m", "640", "-g", "adm")
        machine.run("systemctl", "reload", "gserver.service")
        until(lambda: machine.events("server.reload_failed"), "the failure is only in the log")
        assert is_served(pems[1])


# Kubernetes.


def kustomized(folder: str) -> str:
    """What `kubectl apply --kustomize` would send."""
    command = [program("kubectl"), "kustomize", str(DEPLOY / "kubernetes" / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", ["base", "tls"])
def test_the_manifests_fit_the_schemas_of_kubernetes(folder: str, tmp_path: Path) -> None:
    package("kubernetes_validate")
    (tmp_path / "all.yaml").write_text(text := kustomized(folder))
    assert set(by_kind(text)) == set(manifests())
    validate = [sys.executable, "-m", "kubernetes_validate", "--strict", str(tmp_path / "all.yaml")]
    done = subprocess.run(validate, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count(" passed ") == len(manifests())


def test_with_tls_the_manifest_mounts_what_the_server_reads() -> None:
    plain, pod = (
        by_kind(kustomized(folder))["Deployment"]["spec"]["template"]["spec"]
        for folder in ("base", "tls")
    )
    [container], [volume] = pod["containers"], pod["volumes"]
    [mount] = container["volumeMounts"]
    values = {each["name"]: each.get("value") for each in container["env"]}
    named = {name: values.pop(name) for name in list(values) if name.startswith("GSERVER_TLS")}
    assert set(values) == {each["name"] for each in plain["containers"][0]["env"]}
    # A Secret of type kubernetes.io/tls has these two keys.
    assert named == {
        f"GSERVER_TLS_{name}": f"{mount['mountPath']}/tls.{end}"
        for name, end in (("CERT", "crt"), ("KEY", "key"))
    }
    assert mount["name"] == volume["name"]
    comments = (DEPLOY / "kubernetes/tls/kustomization.yaml").read_text()
    assert f"secret tls {volume['secret']['secretName']} " in comments
    assert (volume["secret"]["defaultMode"], pod["securityContext"]["fsGroup"]) == (
        0o440,
        pod["securityContext"]["runAsUser"],
    )


def test_clients_fit_the_memory_whatever_they_send() -> None:
    """By the figures of docs/security.md: what a process takes, and what a hostile client holds."""
    values = {each["name"]: each.get("value") for each in container()["env"]}
    [hostile] = re.findall(r"and (\d+) KB \(WHERE with a long id\)", SECURITY)
    idle_mb = 22 + 32 + 29
    assert container()["resources"]["limits"]["memory"] == "1Gi"
    assert int(values["GSERVER_MAX_CLIENTS"]) * int(hostile) / 1000 + idle_mb < 2**30 / 1e6


def test_the_rules_for_the_operator_are_those_of_prometheus() -> None:
    found = by_kind(kustomized("monitoring"))
    rules = package("yaml").safe_load((DEPLOY / "prometheus/gserver.rules.yml").read_text())
    assert operator_rules.FILE.read_text() == operator_rules.rendered(), (
        "python -m lab.operator_rules"
    )
    assert found["PrometheusRule"]["spec"] == rules
    [endpoint] = found["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {each["name"] for each in container()["ports"]}
    labels = manifests()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["PodMonitor"]["spec"]["selector"]["matchLabels"] == labels
    key = endpoint["authorization"]["credentials"]
    [token] = [
        each["valueFrom"]["secretKeyRef"]
        for each in container()["env"]
        if each["name"] == "GSERVER_ADMIN_TOKEN"
    ]
    assert key == token


def test_names_in_the_manifest_are_consistent() -> None:
    found = manifests()
    pod = found["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "gserver"
    assert pod["spec"]["serviceAccountName"] == found["ServiceAccount"]["metadata"]["name"]
    # Otherwise Kubernetes sets a GSERVER_PORT variable from the Service's name.
    assert pod["spec"]["enableServiceLinks"] is False
    ports = {each["name"] for each in container()["ports"]}
    probes = [
        container()[f"{kind}Probe"]["httpGet"]["port"]
        for kind in ("startup", "liveness", "readiness")
    ]
    opened = [
        port["port"] for rule in found["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]
    ]
    assert {
        *probes,
        *opened,
        *(each["targetPort"] for each in found["Service"]["spec"]["ports"]),
    } == ports


def test_a_server_with_the_variables_of_the_manifest_answers_its_probes() -> None:
    secrets = {"admin-token": "a secret", "redis-url": f"redis://127.0.0.1:{free_port()}"}
    env = {}
    for each in container()["env"]:
        source = each.get("valueFrom", {})
        env[each["name"]] = each.get("value") or (
            secrets[source["secretKeyRef"]["key"]]
            if "secretKeyRef" in source
            else "gserver-5d4f-x7x2p"
        )
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    assert (int(env["GSERVER_PORT"]), int(env["GSERVER_ADMIN_PORT"])) == (
        ports["gserver"],
        ports["admin"],
    )
    env |= {"GSERVER_PORT": "0", "GSERVER_ADMIN_PORT": "0"}
    with Running(command=[*GSERVER, "serve"], env=env) as server, server.client() as client:
        server.wait_for("agent.ready")
        assert client.ask(b"WHERE") == b"gserver-5d4f-x7x2p"

        def status(path: str, **headers: str) -> int:
            request = urllib.request.Request(
                f"http://127.0.0.1:{server.admin_port()}{path}", headers=headers
            )
            try:
                with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code

        for kind in ("startup", "liveness", "readiness"):
            assert status(container()[f"{kind}Probe"]["httpGet"]["path"]) == 200
        assert status("/metrics") == 401
        assert status("/metrics", Authorization="Bearer a secret") == 200
        server.send_signal(signal.SIGTERM)
        server.wait_for("server.draining")
        ready = container()["readinessProbe"]["httpGet"]["path"]
        until(lambda: status(ready) == 503, "that is published")
        assert status(container()["livenessProbe"]["httpGet"]["path"]) == 200
        assert client.ask(b"WHY") == b"42"
