"""The page in a real browser: it shows the real numbers, follows changes, and says so when the server goes away."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.browser import Browser, browser
from tests.running import Running, until


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as window:
        yield window


def page(server: Running) -> str:
    server.wait_for("agent.ready")
    return f"http://127.0.0.1:{server.admin_port()}/"


def test_it_shows_the_real_numbers_and_follows_changes(window: Browser) -> None:
    with Running("--admin-port", "0", "--workers", "2", "--server-id", "the-one") as server, ExitStack() as stack:
        server.wait_for("worker.ready", 2)
        window.open(page(server))
        until(lambda: window.text("state") == "ready", "the page has the status")
        assert window.text("id") == "the-one"
        assert window.text("now") == "0"
        assert window.text("limit") == "of 10,000"
        clients = [stack.enter_context(server.client()) for _ in range(12)]
        until(lambda: clients[0].who() == 12, "all are accepted")
        until(lambda: window.text("now") == "12", "the page has noticed them")
        for client in clients[:6]:
            client.sock.close()
        until(lambda: window.text("now") == "6", "the page has noticed that they are gone")
        assert "12" in window.text("clients")  # most at once
        assert clients[6].ask(b"NOPE") == b"ERR unknown command"
        until(lambda: "unknown command" in window.text("errors"), "the page has noticed the error")

        def has_rate() -> bool:
            clients[7].send(b"WHY\n" * 500)
            assert b"".join(clients[7].line() for _ in range(500)) == b"42\n" * 500
            return window.text("rate").replace(",", "").partition(".")[0].isdigit() and window.text("rate") != "0"

        until(has_rate, "the page shows a rate")
        pids = {str(worker.pid) for worker in server.workers()}
        assert {line.split()[0] for line in window.text("workers").splitlines()} == pids
        server.workers()[0].kill()
        server.wait_for("worker.ready", 3)
        until(lambda: "1 restarted" in window.text("workers-title"), "the page has noticed the restart")
        assert window.run("return document.querySelectorAll('#plot-clients polyline').length") >= 1
        assert "clients of this server" in window.run("return document.getElementById('plot-clients').ariaLabel")
        assert window.complaints() == []


def test_it_says_when_the_server_goes_away_and_when_it_is_back(window: Browser) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Running("--admin-port", str(port)) as server:
        window.open(page(server))
        until(lambda: window.text("state") == "ready", "it is there")
    until(lambda: window.text("state") == "away", "the page has noticed")
    assert window.run("return document.getElementById('alarm').hidden") is False
    assert "No answer from the server since" in window.text("alarm")
    with Running("--admin-port", str(port)) as server:
        server.wait_for("agent.ready")
        until(lambda: window.text("state") == "ready", "it is back")
        assert window.run("return document.getElementById('alarm').hidden") is True


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (320, "dark")])
def test_it_fits_screens_large_and_small_light_and_dark(window: Browser, width: int, scheme: str) -> None:
    with Running("--admin-port", "0") as server:
        window.resize(width, 900, scheme)
        window.open(page(server))
        until(lambda: window.text("state") == "ready", "it is there")
        assert window.run("return document.documentElement.scrollWidth") <= width
        ground = window.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(int(part) for part in ground[4:-1].split(",")) < 200) is (scheme == "dark")
