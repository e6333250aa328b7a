"""The page shows what the measurements have found, and TLS is measured as it says."""

import json
import re
import resource
import subprocess
from collections.abc import Iterator

import pytest

from bench import tls
from bench.measure import tree
from bench.peers import ROOT
from bench.report import PAGE, TABLES, tables
from bench.scenarios import FULL
from tests.running import LIMIT, program

TEXT = PAGE.read_text()


@pytest.fixture
def _same_limit_of_files() -> Iterator[None]:
    """A scenario raises this process's, for its children."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_page_has_a_place_for_each_table_and_each_scenario_has_a_table() -> None:
    assert set(re.findall(r"<!-- table: (\w+) -->", TEXT)) == {*TABLES, "goals", "machine"}
    assert {scenario.name for scenario in FULL} == {table.scenario for table in TABLES.values()}


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    results = json.loads((ROOT / "bench/results.json").read_text())
    for name, text in tables(results, results).items():
        assert f"<!-- table: {name} -->\n\n{text}\n\n<!-- end -->" in TEXT, (
            f"{name}: bin/bench --render"
        )


def test_what_has_no_results_shows_no_figures() -> None:
    results = json.loads((ROOT / "bench/results.json").read_text())
    for name in (name for name, table in TABLES.items() if table.scenario not in results):
        shown = re.search(rf"<!-- table: {name} -->(.*?)<!-- end -->", TEXT, re.S)
        assert shown
        assert shown[1].strip() == f"Not measured yet: `bin/bench {name}`."


@pytest.mark.usefixtures("_same_limit_of_files")
@pytest.mark.parametrize("service", tls.SERVICES)
def test_each_service_takes_what_the_load_generator_asks_of_tls(service: str) -> None:
    for name in ("haproxy", "stunnel", "openssl", "taskset"):
        program(name)
    with tls.serving(service) as server:
        # The proxy; gserver's supervisor, worker and agent.
        assert len(tree(server)) == (service in tls.PROXIES) + 3
        words = ["openssl", "s_client", "-connect", f"{server.host}:{server.port}", "-tls1_3"]
        words += ["-groups", "X25519", "-ciphersuites", "TLS_AES_256_GCM_SHA384"]
        done = subprocess.run(
            words, input="", capture_output=True, text=True, timeout=LIMIT, check=False
        )
        is_met = "New, TLSv1.3, Cipher is TLS_AES_256_GCM_SHA384" in done.stdout
        assert is_met == server.is_tls == (service != tls.PLAIN), done.stdout + done.stderr
