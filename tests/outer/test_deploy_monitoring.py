"""The files for Prometheus and Grafana: checked by promtool, and run by a real Prometheus.

Grafana itself does not run here. The queries of the dashboard do, and its layout is checked.
"""

import json
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from gserver.config import OPTIONS, flag
from lab.certificates import make_certificates
from lab.documents import OPERATIONS, rows
from lab.packages import package
from lab.redises import Redis, free_port
from lab.running import LIMIT, ROOT, Running, argv, program, until
from lab.tls_client import trust

FILES = ROOT / "deploy/prometheus"
RULES = (FILES / "gserver.rules.yml").read_text()
UNIT_TESTS = sorted(FILES.glob("*.test.yml"))
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
DASHBOARD = json.loads((ROOT / "deploy/grafana/gserver.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

ALERTS = re.findall(r"- alert: (\w+)", RULES)
RECORDS = set(re.findall(r"- record: (\S+)", RULES))
TOKEN = "not-a-secret"
#: In place of 15 s, and of the first minute of a job, to keep the tests short.
INTERVAL, NEW = "250ms", "3s"
RATE = "10s"


def replaced(pattern: str, by: str, text: str) -> str:
    """The text with the only match of a pattern replaced."""
    text, count = re.subn(pattern, by, text)
    assert count == 1, pattern
    return text


def configuration(folder: Path, targets: list[str]) -> Path:
    """Copy the files to a folder, with other targets, a token and short times."""
    for path in FILES.glob("*.yml"):
        shutil.copy(path, folder)
    rules = folder / "gserver.rules.yml"
    rules.write_text(replaced("offset 1m", f"offset {NEW}", rules.read_text()))
    (folder / "gserver.token").write_text(TOKEN)
    config = folder / "prometheus.yml"
    text = replaced(
        r"(?m)^ +- targets:\n( +- 10\.0\.0\.\d:4243\n)+",
        f"      - targets: {targets}\n",
        config.read_text(),
    )
    text = replaced(r"targets: \[127\.0\.0\.1:9093\]", "targets: []", text)
    for name in ("scrape", "evaluation"):
        text = replaced(f"{name}_interval: 15s", f"{name}_interval: {INTERVAL}", text)
    config.write_text(text)
    return config


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_accepts_the_configuration_and_the_rules(tmp_path: Path) -> None:
    promtool("check", "config", configuration(tmp_path, ["127.0.0.1:4243"]))
    promtool("check", "config", "--syntax-only", FILES / "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", FILES / "gserver.rules.yml")


def test_the_service_discoveries_in_comments_are_valid(tmp_path: Path) -> None:
    config = configuration(tmp_path, [])
    begin, end = config.read_text().split("    static_configs:\n")
    found = dict(re.findall(r"(?m)^    # (\w+_configs):((?: .*)?(?:\n    #   - .*)*)$", end))
    assert list(found) == [
        f"{name}_configs" for name in ("file_sd", "dns_sd", "kubernetes_sd", "relabel")
    ]
    [kubernetes] = package("yaml").safe_load(found.pop("kubernetes_sd_configs").replace("#", ""))
    assert (
        kubernetes["role"] == "pod"
    )  # This is not checked further: Debian's Prometheus has no Kubernetes discovery.
    lines = "".join(
        f"    {name}:{value}\n".replace("    #   - ", "      - ") for name, value in found.items()
    )
    config.write_text(begin + lines)
    promtool("check", "config", config)


def test_the_unit_tests_of_the_rules_pass(tmp_path: Path) -> None:
    version = re.match(r"promtool, version (\d+)", promtool("--version"))
    assert version
    for path in FILES.glob("gserver.*.yml"):
        text = path.read_text()
        if int(version[1]) >= 3 and path.name == "gserver.rules.yml":
            # It omits the sample at the start of a window, which the unit tests count.
            text, count = re.subn(r"\[(\w+)\]", r"[\g<1>1ms]", text)
            assert count > 20
        (tmp_path / path.name).write_text(text)
    promtool("test", "rules", *(tmp_path / path.name for path in UNIT_TESTS))


def test_every_rule_has_a_unit_test_and_every_alert_also_one_where_it_does_not_fire() -> None:
    text = "".join(path.read_text() for path in UNIT_TESTS)
    assert set(re.findall(r"alertname: (\w+), exp_alerts: \[\]", text)) == set(ALERTS)
    assert set(re.findall(r"alertname: (\w+)\n +exp_alerts:\n +- exp_labels", text)) == set(ALERTS)
    tested = "".join(re.findall(r"expr: '(.*)'", text))
    assert {name for name in RECORDS if name in tested} == RECORDS


def test_a_recording_rule_uses_the_window_in_its_name() -> None:
    found = re.findall(
        r"- record: job_sli:gserver_errors:ratio(\w+)\n +labels: .*\n +expr: (.*)\n", RULES
    )
    assert len(found) == 10
    for window, expression in found:
        windows = re.findall(r"\[(\w+)\]", expression)
        assert windows == [window] * len(windows)
        assert windows or (window == "5m" and expression.count(":rate5m") == 2)


def test_the_alerts_are_the_sections_of_the_runbook() -> None:
    assert re.findall(r"^## (.*)$", RUNBOOK, re.M) == [*ALERTS, "Problems without an alert"]
    severities = dict(
        re.findall(r"- alert: (\w+)\n(?:(?! +- alert).*\n)*?.*severity: (\w+)", RULES)
    )
    said = dict(re.findall(r"^## (\w+)\n\n\*(Page|Ticket)\.\*", RUNBOOK, re.M))
    assert {name: word.lower() for name, word in said.items()} == severities


def test_the_runbook_names_only_existing_events_options_and_sections() -> None:
    events = set(
        re.findall(r"`((?:server|worker|agent|process|client|command|cluster|tls)\.\w+)`", RUNBOOK)
    )
    assert events - {"process.exit_code"} <= set(rows("Logs"))
    others = {"--server", "--tls", "--tls-name", "--latency", "--cacert", "--sort"}
    options = {flag(name) for name in OPTIONS} | others
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", RUNBOOK)) <= options
    anchors = {name.lower() for name in ALERTS}
    assert set(re.findall(r"\]\(#([^)]+)\)", RUNBOOK)) <= anchors
    titles = {
        title.lower().replace(" ", "-") for title in re.findall(r"^###? (.*)$", OPERATIONS, re.M)
    }
    assert set(re.findall(r"operations\.md#([^)]+)\)", RUNBOOK)) <= titles


@dataclass
class Monitored:
    """A cluster of two servers, the address of a third, and a Prometheus that scrapes all three."""

    servers: list[Running]
    trust: ssl.SSLContext
    dead: str
    url: str

    def api(self, path: str, **parameters: str) -> Any:
        """The data of a response of Prometheus; an error fails the test."""
        try:
            with urlopen(
                f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=LIMIT
            ) as reply:
                return json.load(reply)["data"]
        except HTTPError as error:
            with error:
                pytest.fail(f"{parameters}: {error.read().decode()}")

    def query(self, expression: str) -> list[Any]:
        """The current result of an expression."""
        found = self.api("query", query=expression)
        return [found] if found["resultType"] == "scalar" else list(found["result"])

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.api("rules")["groups"] for rule in group["rules"]]

    def use(self) -> None:
        """Send each kind of command to each server."""
        for server in self.servers:
            with server.client(context=self.trust) as client:
                for command in (b"WHO", b"WHERE", b"WHY", b"NOPE"):
                    client.ask(command)

    def sample_names(self) -> set[str]:
        """The names of the samples in the /metrics of a server."""
        request = Request(
            f"http://127.0.0.1:{self.servers[0].admin_port()}/metrics",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        with urlopen(request, timeout=LIMIT) as reply:
            return set(re.findall(r"^(\w+)", reply.read().decode(), re.M))


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    prometheus, folder = program("prometheus"), tmp_path_factory.mktemp("prometheus")
    with ExitStack() as stack:
        redis = stack.enter_context(Redis(folder))
        env = {"GSERVER_ADMIN_TOKEN": TOKEN, "REDIS_URL": redis.url}
        make_certificates(folder, days=30)
        options = argv(
            f"--admin-port 0 --tls-cert {folder / 'server.pem'} --tls-key {folder / 'server.key'}"
        )
        servers = [stack.enter_context(Running(*options, env=env)) for _ in range(2)]
        for server in servers:
            server.wait_for("cluster.joined")
        trusted = trust(folder)
        for server in servers:
            stack.enter_context(server.client(context=trusted))
        port, dead = free_port(), f"127.0.0.1:{free_port()}"
        config = configuration(
            folder, [*(f"127.0.0.1:{server.admin_port()}" for server in servers), dead]
        )
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            [
                prometheus,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        stack.callback(process.wait, LIMIT)
        stack.callback(process.kill)
        there = Monitored(servers, trusted, dead, f"http://127.0.0.1:{port}")

        def is_ready() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                with urlopen(f"{there.url}/-/ready", timeout=LIMIT) as reply:
                    return bool(reply.status == 200)
            except HTTPError as error:
                error.close()
                return False
            except URLError:
                return False

        until(is_ready, "Prometheus is ready")
        until(lambda: len(there.query("gserver_ready == 1")) == 2, "both servers are scraped")
        yield there


def expressions() -> list[str]:
    """Every query of the dashboard, with its variables filled in."""
    found = [target["expr"] for panel in PANELS for target in panel["targets"]]
    found += [each["expr"] for each in DASHBOARD["annotations"]["list"] if "expr" in each]
    values = {"$job": "gserver", "$instance": ".*", "$__rate_interval": RATE}
    for name, value in values.items():
        found = [expression.replace(name, value) for expression in found]
    assert not [expression for expression in found if "$" in expression]
    return found


def names(expression: str) -> set[str]:
    """The names of metrics and of recording rules in an expression."""
    return {
        word
        for word in re.findall(r"[a-zA-Z_:][\w:]*", expression)
        if re.match(r"gserver_|\w+:gserver_", word)
    }


def test_every_query_of_the_dashboard_has_data_once_the_servers_are_used(
    monitored: Monitored,
) -> None:
    # The annotations: although a server is down, no alert fires this soon after the start.
    empty = {expression for expression in expressions() if expression.startswith("ALERTS{")}

    def without() -> set[str]:
        monitored.use()
        return {expression for expression in expressions() if not monitored.query(expression)}

    until(lambda: without() <= empty, "every query has data", 2 * LIMIT)
    assert [expression for expression in empty if monitored.query(expression)] == []


def test_the_dashboard_shows_the_real_figures(monitored: Monitored) -> None:
    def shown(title: str) -> list[float]:
        [panel] = [panel for panel in PANELS if panel["title"] == title and panel["type"] == "stat"]
        found = []
        for target in panel["targets"]:
            expression = target["expr"].replace("$job", "gserver").replace("$instance", ".*")
            found += [float(sample["value"][1]) for sample in monitored.query(expression)]
        return found

    until(lambda: shown("Servers") == [2, 3], "two of three servers are ready")
    until(lambda: shown("Clients") == [2], "each server has a client")


def test_the_rules_are_evaluated_without_error(monitored: Monitored) -> None:
    until(
        lambda: all(rule["health"] != "unknown" for rule in monitored.rules()),
        "all rules have been evaluated",
    )
    rules = monitored.rules()
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == set(ALERTS)
    assert {rule["name"] for rule in rules if rule["type"] == "recording"} == RECORDS
    for rule in rules:
        monitored.query(rule["query"])
    # Every recording rule has a result.
    until(
        lambda: all(
            monitored.query(rule["query"]) for rule in rules if rule["type"] == "recording"
        ),
        "all rules have results",
    )


def test_the_server_has_every_metric_that_rules_and_dashboard_use(monitored: Monitored) -> None:
    queries = [*expressions(), *(rule["query"] for rule in monitored.rules())]
    named = {name for query in queries for name in names(query)}
    assert named - monitored.sample_names() - RECORDS == set()
    assert len(named) > 20


def test_a_firing_alert_links_to_its_section_of_the_runbook(monitored: Monitored) -> None:
    def down() -> list[dict[str, Any]]:
        return [
            alert
            for alert in monitored.api("alerts")["alerts"]
            if alert["labels"]["alertname"] == "GserverDown"
        ]

    [alert] = until(down, "the missing server is noticed")
    assert alert["labels"]["instance"] == monitored.dead
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert page.endswith("/docs/runbook.md")
    assert anchor == "gserverdown"


def test_every_alert_links_to_its_own_section() -> None:
    links = re.findall(
        r"- alert: (\w+)\n(?:(?! +- alert).*\n)*?.*runbook_url: '\{\{ (.*) \}\}#(\w+)'", RULES
    )
    assert links == [(name, "$externalLabels.gserver_runbook", name.lower()) for name in ALERTS]
    assert "gserver_runbook: https://" in (FILES / "prometheus.yml").read_text()


def test_the_dashboard_has_variables_and_its_panels_do_not_overlap() -> None:
    expected = ["datasource", "job", "instance"]
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == expected
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["description"], panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(
            source == {"type": "prometheus", "uid": "${datasource}"} for source in sources
        ), panel["title"]
