"""The page shows the measured figures, and TLS is measured as documented."""

import importlib.util
import json
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from bench import tls
from bench.measure import SERVER_CORE, Failed, tree, work
from bench.page import PAGE, idle_client_bytes, tables
from bench.peers import PROGRAMS, SPELLING_PEERS, build, running
from bench.report import TABLES, delta_ms, pick
from bench.scenarios import FULL, MODES, SHAPES
from gserver.config import Config
from lab.running import LIMIT, ROOT, program

TEXT = PAGE.read_text()
RESULTS = json.loads((ROOT / "bench/results.json").read_text())


@pytest.fixture
def _same_limit_of_files() -> Iterator[None]:
    """Restore the descriptor limit, which a scenario raises for its children."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_page_has_a_place_for_each_table_and_each_scenario_has_a_table() -> None:
    marks = re.findall(r"<!-- table: (\w+) -->", TEXT)
    assert sorted(marks) == sorted([*TABLES, "goals", "summary", "software"])
    shown = {scenario for table in TABLES.values() for scenario in table.scenarios}
    assert {scenario.name for scenario in FULL} == shown


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    for name, text in tables(RESULTS, RESULTS).items():
        assert f"<!-- table: {name} -->\n\n{text}\n\n<!-- end -->" in TEXT, (
            f"{name}: bin/bench --render"
        )


def test_every_page_gives_the_same_memory_of_an_idle_client() -> None:
    figures = r"([\d,.]+) bytes"
    idle = r"idle\s+client"
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        shown = re.findall(
            rf"{idle}\s+(?:costs|takes|needs|uses)\s+(?:about\s+)?{figures}|"
            rf"{figures}\s+(?:of memory\s+)?(?:per|an|for an|for each)\s+{idle}",
            page.read_text(),
        )
        assert {one or other for one, other in shown} <= {idle_client_bytes(RESULTS)}, page.name
    assert f"An idle client takes {idle_client_bytes(RESULTS)} bytes" in TEXT


def test_no_client_was_counted_later_than_promised() -> None:
    assert delta_ms(Config().heartbeat_interval_seconds) == pytest.approx(600)
    for interval in {sample["interval"] for sample in RESULTS["propagation"]["samples"]}:
        delays = pick(RESULTS, "propagation", "delay_ms", interval=interval)
        assert max(delays) <= delta_ms(interval)


def test_every_plot_of_the_page_names_its_commit_date_and_machine() -> None:
    for name in re.findall(r"\(plots/(\w+)\.svg\)", TEXT):
        drawn = (ROOT / f"docs/plots/{name}.svg").read_text()
        assert re.search(r">gserver \w+, \d{4}-\d\d-\d\d, [^<]+ cores, \d+ GB</text>", drawn), name


def test_a_table_without_results_shows_no_figures() -> None:
    for name in (name for name, table in TABLES.items() if table.scenario not in RESULTS):
        shown = re.search(rf"<!-- table: {name} -->(.*?)<!-- end -->", TEXT, re.S)
        assert shown
        assert shown[1].strip() == f"Not measured yet: `bin/bench {name}`."


@pytest.mark.usefixtures("_same_limit_of_files")
@pytest.mark.parametrize("service", tls.SERVICES)
def test_each_service_accepts_the_tls_settings_of_the_load_generator(service: str) -> None:
    for name in ("haproxy", "stunnel", "openssl", "taskset"):
        program(name)
    with tls.serving(service) as server:
        # The proxy, and gserver's supervisor, worker and agent.
        assert len(tree(server)) == (service in tls.PROXIES) + 3
        words = ["openssl", "s_client", "-connect", f"{server.host}:{server.port}", "-tls1_3"]
        words += ["-groups", "X25519", "-ciphersuites", "TLS_AES_256_GCM_SHA384"]
        done = subprocess.run(
            words, input="", capture_output=True, text=True, timeout=LIMIT, check=False
        )
        is_met = "New, TLSv1.3, Cipher is TLS_AES_256_GCM_SHA384" in done.stdout
        assert is_met == server.is_tls == (service != tls.PLAIN), done.stdout + done.stderr


@pytest.fixture
def _built(_same_limit_of_files: None) -> None:
    """Build the load generator. Skip the test without the programs of `bin/bench`."""
    missing = [name for name in (*PROGRAMS, "gcc") if not shutil.which(name)]
    if missing or not importlib.util.find_spec("uvloop"):
        pytest.skip(f"bin/bench installs: {', '.join([*missing, 'uvloop'])}")
    build(["gserver"])


@pytest.mark.usefixtures("_built")
def test_every_shape_of_commands_is_answered_by_gserver_and_by_its_peer() -> None:
    own = next(shape for shape in SHAPES.values() if shape.options)
    with (
        running("gserver", cores=SERVER_CORE, options=own.options) as gserver,
        running(SPELLING_PEERS["functions"].name, cores=SERVER_CORE) as functions,
        running(SPELLING_PEERS["any-spelling"].name, cores=SERVER_CORE) as any_spelling,
    ):
        peers = {"functions": functions, "any-spelling": any_spelling}
        for shape in SHAPES.values():
            for server in (gserver, peers[shape.peer]):
                # A wrong reply is an error of the load generator, and raises `Failed`.
                found = work(server, MODES[shape.order], 2, 32, 0.05, lines=shape.lines)
                assert found["answers"] > 0, (shape, server.name)


@pytest.mark.usefixtures("_built")
def test_a_wrong_reply_fails_the_measurement() -> None:
    # This peer understands only the exact spelling.
    with (
        running("uvloop", cores=SERVER_CORE) as server,
        pytest.raises(Failed, match="WHO: ERR unknown command"),
    ):
        work(server, "pipeline", 1, 1, 0.05, lines="who\n")
