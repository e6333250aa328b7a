"""The page in a real browser: it shows the real figures, follows changes, and reports outages."""

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab.browser import Browser, browser
from lab.certificates import make_certificates
from lab.clusters import cluster
from lab.redises import Redis, free_port
from lab.running import Running, until


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as window:
        yield window


def page(server: Running) -> str:
    server.wait_for("agent.ready")
    return f"http://127.0.0.1:{server.admin_port()}/"


def test_the_page_shows_the_real_figures_and_follows_changes(window: Browser) -> None:
    with (
        Running("--admin-port", "0", "--workers", "2", "--server-id", "the-one") as server,
        ExitStack() as stack,
    ):
        server.wait_for("worker.ready", 2)
        window.open(page(server))
        until(lambda: window.text("state") == "healthy", "the page has the status")
        assert window.text("id") == "the-one"
        assert window.text("now") == "0"
        assert window.text("limit") == "of 10,000"
        clients = [stack.enter_context(server.client()) for _ in range(12)]
        until(lambda: clients[0].who() == 12, "all are accepted")
        until(lambda: window.text("now") == "12", "the page shows the clients")
        for client in clients[:6]:
            client.sock.close()
        until(lambda: window.text("now") == "6", "the page shows that they have disconnected")
        assert "12" in window.text("clients")  # the peak
        assert clients[6].ask(b"NOPE") == b"ERR unknown command"
        until(lambda: "unknown command" in window.text("errors"), "the page shows the error")

        def has_rate() -> bool:
            clients[7].send(b"WHY\n" * 500)
            assert b"".join(clients[7].line() for _ in range(500)) == b"42\n" * 500
            return (
                window.text("rate").replace(",", "").partition(".")[0].isdigit()
                and window.text("rate") != "0"
            )

        until(has_rate, "the page shows a rate")
        pids = {str(worker.pid) for worker in server.workers()}
        found = [line.split() for line in window.text("workers").splitlines()]
        assert {line[0] for line in found[:2]} == pids
        assert [line[1] for line in found[2:]] == ["supervisor", "agent"]
        assert all("MB" in line for line in found)
        heads = window.run(
            "return [...document.querySelectorAll('th[scope=col]')].map(head => head.innerText)"
        )
        figures = ["reads per second", "memory", "CPU", "files", "last heartbeat"]
        first = heads.index("reads per second") - 3
        assert heads[first : first + 8] == ["process", "age", "clients", *figures]
        widths = "return [...document.querySelectorAll('#workers tr')].map(row => row.cells.length)"
        assert set(window.run(widths)) == {8}
        server.workers()[0].kill()
        server.wait_for("worker.ready", 3)
        until(lambda: "1 restart" in window.text("workers-title"), "the page shows the restart")
        assert window.run("return document.querySelectorAll('#plot-clients polyline').length") >= 1
        assert "clients of this server" in window.run(
            "return document.getElementById('plot-clients').ariaLabel"
        )
        assert window.problems() == []


def test_the_page_says_what_is_wrong_as_long_as_it_is(window: Browser) -> None:
    options = ["--admin-port", "0", "--server-id", "the-one", "--hang-timeout", "0"]
    with Running(*options) as server:
        window.open(page(server))
        until(lambda: window.text("state") == "healthy", "the page has the status")
        assert window.run("return document.title") == "healthy · the-one · gserver"
        assert window.text("reasons") == ""
        [worker] = server.workers()
        worker.suspend()
        try:
            expected = rf"worker {worker.pid} does not answer: no heartbeat for \d+ s"
            until(lambda: re.fullmatch(expected, window.text("reasons")), "the page says it")
            assert window.text("state") == "degraded"
            assert window.run("return document.title") == "degraded · the-one · gserver"
            assert "does not answer" in window.text("workers")
        finally:
            worker.resume()
        until(lambda: window.text("state") == "healthy", "it is over")
        assert window.text("reasons") == ""
        worker.kill()
        until(lambda: f"worker {worker.pid} died" in window.text("events"), "the event is shown")
        assert window.problems() == []


def test_the_page_lists_the_clients_while_that_is_looked_at(window: Browser) -> None:
    with Running("--admin-port", "0", "--max-clients", "2") as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client(source="127.0.0.9")) for _ in range(2)]
        until(lambda: clients[0].who() == 2, "both are counted")
        with server.client() as rejected:
            assert rejected.rest() == b"ERR too many clients\n"
        window.open(page(server))
        until(lambda: window.text("state") == "degraded", "the page has the status")
        window.run("document.getElementById('who').open = true")
        until(lambda: len(window.text("who-rows").splitlines()) == 2, "both are listed")
        assert all(line.startswith("127.0.0.9") for line in window.text("who-rows").splitlines())
        assert window.text("who-note") == "2 clients; by address: 127.0.0.9 2"
        assert "too many clients" in window.text("ended")
        clients[0].sock.close()
        until(lambda: window.text("who-note").startswith("1 client;"), "the list follows")


def test_the_charts_begin_with_what_the_server_has_kept(window: Browser) -> None:
    with Running("--admin-port", "0") as server:
        server.wait_for("agent.ready")
        time.sleep(4)
        window.open(page(server))
        until(lambda: window.run("return points.length") >= 3, "there are points at once")
        first, last = window.run("return [points[0].at, points.at(-1).at]")
        assert last - first >= 2000
        window.run("document.getElementById('range').click()")
        assert window.text("range") == "show five minutes"
        until(lambda: window.run("return points.every(p => p.at % 10000 < 2000)"), "by tens")


def test_the_page_shows_how_long_the_certificate_is_valid(window: Browser, tmp_path: Path) -> None:
    make_certificates(tmp_path)  # They are valid for two days.
    files = ["--tls-cert", str(tmp_path / "server.pem"), "--tls-key", str(tmp_path / "server.key")]
    with Running("--admin-port", "0", *files) as server:
        window.open(page(server))
        until(
            lambda: "TLS, certificate valid for 1 d" in window.text("tls"),
            "the page shows the server",
        )
        assert colour(window, "tls") == colour(window, "alarm", "backgroundColor"), (
            "a certificate that expires soon is shown in red"
        )
        assert colour(window, "side") != colour(window, "tls")
        (tmp_path / "server.key").unlink()
        server.send_signal(signal.SIGHUP)
        until(
            lambda: window.text("workers-title").endswith("0 reloads, 1 failed reload"),
            "the reload fails",
        )
        assert not [said for said in window.problems() if page(server) in said]
    with Running("--admin-port", "0") as server:
        window.open(page(server))
        until(lambda: "up" in window.text("side"), "the page shows the server")
        assert window.text("tls") == ""


def colour(window: Browser, element: str, kind: str = "color") -> str:
    """The colour in which an element is shown."""
    return str(window.run(f"return getComputedStyle(document.getElementById('{element}')).{kind}"))


def test_the_validity_of_a_certificate_is_rounded_down_and_red_only_below_two_weeks(
    window: Browser,
) -> None:
    with Running("--admin-port", "0") as server:
        window.open(page(server))
        until(lambda: window.text("state") == "healthy", "the page shows the server")
        for days, words, is_red in (
            (4.99, "valid for 4 d", True),
            (14.1, "valid for 14 d", False),
            (-1, "expired", True),
        ):
            expires_at = f"Date.now() / 1000 + {days * 86400}"
            status = f"{{...last, server: {{...last.server, tls_expires_at: {expires_at}}}}}"
            tls = "const tls = document.getElementById('tls')"
            shown = window.run(
                f"show({status}, last); {tls}; return [tls.textContent, tls.className]"
            )
            assert shown == [f" · TLS, certificate {words}", "bad" if is_red else ""]


def test_nouns_agree_with_their_numbers(window: Browser) -> None:
    with Running("--admin-port", "0") as server:
        window.open(page(server))
        until(lambda: window.text("state") == "healthy", "the page shows the server")
        for count, words in ((0, "0 reloads"), (1, "1 reload"), (2000, "2,000 reloads")):
            script = f"show({{...last, server: {{...last.server, reloads: {count}}}}}, last)"
            shown = window.run(
                f"{script}; return document.getElementById('workers-title').textContent"
            )
            assert shown == f"Workers: 1 of 1 accepting; since start: 0 restarts, {words}"


@pytest.mark.parametrize("path", ["", "?x=y", "#z"])
def test_the_page_works_when_its_address_contains_the_token(window: Browser, path: str) -> None:
    with Running("--admin-port", "0", env={"GSERVER_ADMIN_TOKEN": "s3cret"}) as server:
        window.open(page(server).replace("://", "://x:s3cret@") + path)
        until(lambda: window.text("state") == "healthy", "the page has the status")


def test_the_page_reports_when_the_server_stops_answering_and_when_it_is_back(
    window: Browser,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Running("--admin-port", str(port)) as server:
        window.open(page(server))
        until(lambda: window.text("state") == "healthy", "the page shows the server")
    until(lambda: window.text("state") == "unreachable", "the page reports the outage")
    assert window.run("return document.getElementById('alarm').hidden") is False
    alarm = (
        r"No answer from the server since [0-9:]+ \(Failed to fetch\)\."
        r" The figures below are the last known ones\."
    )
    assert re.fullmatch(alarm, window.text("alarm"))
    with Running("--admin-port", str(port)) as server:
        server.wait_for("agent.ready")
        until(lambda: window.text("state") == "healthy", "the page shows that the server is back")
        assert window.run("return document.getElementById('alarm').hidden") is True


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (320, "dark")]
)
def test_the_page_fits_large_and_small_screens_in_light_and_dark(
    window: Browser, width: int, scheme: str
) -> None:
    with Running("--admin-port", "0") as server:
        window.resize(width, 900, scheme)
        window.open(page(server))
        until(lambda: window.text("state") == "healthy", "the page shows the server")
        assert window.run("return document.documentElement.scrollWidth") <= width
        ground = window.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(int(part) for part in ground[4:-1].split(",")) < 200) is (scheme == "dark")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


#: An id of the maximum length that looks like HTML.
HOSTILE = "<img/src=x>".ljust(128, "x")
PAGE = "http://gs2.example:4243/"


def test_the_page_lists_the_servers_of_the_cluster_and_follows_them(
    window: Browser, store: Redis
) -> None:
    here, there = ["--server-id", "here", "--admin-port", "0"], ["--server-id", HOSTILE]
    there += ["--admin-url", PAGE]
    with cluster(store.url, "gserver", here, there) as [first, second], second.client() as client:
        assert client.ask(b"WHERE") == HOSTILE.encode()
        window.open(page(first))
        both = [[HOSTILE, "1"], ["here (this server)", "0"]]
        until(
            lambda: [row[:2] for row in cells(window)] == both,
            "the page shows the client of the other server",
        )
        assert window.run("return document.querySelectorAll('img').length") == 0
        assert window.run("return document.querySelector('#servers th').scope") == "row"
        links = "return [...document.querySelectorAll('#servers a')].map(a => [a.text, a.href])"
        assert window.run(links) == [[HOSTILE, PAGE]]
        assert all(re.match(r"[0-2]\.\d s ago", row[2]) for row in cells(window))
        assert window.text("servers-note") == ""
        window.resize(320, 900)
        assert window.run("return document.documentElement.scrollWidth") <= 320
        table = "document.querySelector('#cluster .table')"
        assert window.run(f"return {table}.scrollWidth - {table}.clientWidth") <= 0
        second.kill()
        until(lambda: cells(window)[0][2].endswith("late"), "the other server is late")
        store.freeze()
        try:
            known = r"Redis cannot be read \(timeout\): this list is \d+ s old"
            until(
                lambda: re.fullmatch(known, window.text("servers-note")),
                "the page reports the outage",
            )
            assert "here (this server)" in [row[0] for row in cells(window)]
        finally:
            store.thaw()
        assert not [said for said in window.problems() if page(first) in said]


def cells(window: Browser) -> list[list[str]]:
    """The texts of the table of servers, by row; one empty row if there are none."""
    found: list[list[str]] = window.run(
        "return [...document.querySelectorAll('#servers tr')]"
        ".map(row => [...row.cells].map(cell => cell.innerText))"
    )
    return found or [[]]


def test_servers_are_unknown_until_redis_has_answered(window: Browser) -> None:
    with Running("--admin-port", "0", "--redis-url", f"redis://127.0.0.1:{free_port()}") as server:
        window.open(page(server))
        unknown = "Redis cannot be read (connection): the servers are unknown"
        until(lambda: window.text("servers-note") == unknown, "the page reports the outage")
        assert cells(window) == [[]]


#: Replaces the earlier points of the page with one that is SECONDS old; returns the drawn chart.
DRAWN = """
const now = points.at(-1);
points.splice(0, points.length - 1, {...now, at: now.at - SECONDS * 1000, rate: 5});
draw();
const chart = document.getElementById("plot-clients");
const line = chart.querySelector("polyline").getAttribute("points");
const texts = name => [...document.querySelectorAll(`#${name} text`)].map(text => text.textContent);
const words = name => texts(name).slice(-2);
const drawn = line.split(" ").map(point => parseFloat(point)), axis = chart.querySelector("line");
const part = (drawn.at(-1) - drawn[0]) / (axis.getAttribute("x2") - axis.getAttribute("x1"));
return [words("plot-clients"), words("plot-rate"), part, chart.ariaLabel];
"""


def test_a_chart_covers_only_the_minutes_that_have_points(window: Browser) -> None:
    with Running("--admin-port", "0") as server:
        window.resize(1280, 900)
        window.open(page(server))
        until(lambda: window.run("return points.length"), "the page has a point")
        for seconds, minutes in ((0, 1), (59, 1), (61, 2), (200, 4), (300, 5)):
            clients, rate, part, said = window.run(DRAWN.replace("SECONDS", str(seconds)))
            assert clients == rate == [f"{minutes} min ago", "now"]
            assert part == pytest.approx(seconds / 60 / minutes, abs=0.01)
            assert said.endswith(
                "the last minute" if minutes == 1 else f"the last {minutes} minutes"
            )


#: Draws three points of which only the second has a duration; returns the number of dots.
DOTS = """
const now = points.at(-1), at = ago => ({...now, at: now.at - ago, p50: ago === 1000 ? 7 : NaN});
points.splice(0, points.length, ...[2000, 1000, 0].map(ago => ({...at(ago), p99: NaN})));
draw();
return document.querySelectorAll("#plot-time circle").length;
"""


def test_a_value_between_two_gaps_is_drawn_as_a_dot(window: Browser) -> None:
    with Running("--admin-port", "0") as server:
        window.open(page(server))
        until(lambda: window.run("return points.length"), "the page has a point")
        assert window.run(DOTS) == 1


#: Returns the colours of the page by name.
PALETTE = """
const style = getComputedStyle(document.documentElement);
return Object.fromEntries(NAMES.map(name => [name, style.getPropertyValue("--" + name)]));
"""


def test_all_texts_have_enough_contrast(window: Browser) -> None:
    """At least 4.5 to 1: https://www.w3.org/TR/WCAG22/#contrast-minimum."""
    words = ["ink", "soft", "own", "all", "good", "warn", "bad"]
    pairs = [*((word, "card") for word in words), ("ink", "ground"), ("soft", "ground")]
    with Running("--admin-port", "0") as server:
        window.open(page(server))
        for scheme in ("light", "dark"):
            window.resize(1280, 900, scheme)
            colour = window.run(PALETTE.replace("NAMES", json.dumps([*words, "card", "ground"])))
            for word, ground in pairs:
                low, high = sorted((luminance(colour[word]), luminance(colour[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, word, ground)


def luminance(colour: str) -> float:
    """The relative luminance of #rgb or #rrggbb, from 0 to 1."""
    digits = colour.strip().lstrip("#")
    pairs = (
        [digits[at : at + 2] for at in (0, 2, 4)]
        if len(digits) == 6
        else [digit * 2 for digit in digits]
    )
    parts = [int(pair, 16) / 255 for pair in pairs]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
