"""The effects of a misbehaving Redis, Sentinel or update on disk on a server of a cluster."""

import re
import shutil
import socket
import time
from operator import methodcaller
from pathlib import Path

import pytest
import redis

from gserver.agent.agent import MAX_DATA_BYTES
from gserver.cluster.membership import Heartbeat
from gserver.cluster.redis_link import RedisLink, kind_of
from gserver.cluster.sentinel import SentinelFollower
from gserver.config import Config
from lab.impostor import listener, named
from lab.redises import Redis
from lab.rows import Notes
from lab.running import LIMIT, PATIENCE, ROOT, Running, until

SECRETS = ("hush-hush", "qui et/")
HEARTBEAT = Heartbeat("one", "a1", sequence=1, clients=5, ttl_ms=5000, interval_ms=500)


def ask_first(link: RedisLink, port: int) -> SentinelFollower:
    """Make a link ask the Sentinel at this port first; return its follower of Sentinels."""
    assert link._sentinels is not None
    while link._sentinels.addresses[0][1] != port:
        link._sentinels.skip()
    return link._sentinels


def trickle(sock: socket.socket) -> None:
    for _ in range(round(60 * PATIENCE / 0.2)):
        sock.sendall(b"*")
        time.sleep(0.2)


REPLIES = {
    "texts": b"*8\r\n" + b"$1\r\na\r\n" * 8,
    "one too few": b"*7\r\n" + b":1\r\n" * 5 + b"$1\r\na\r\n:1\r\n",
    "too few": b"*2\r\n:1\r\n:2\r\n",
    "one": b":1\r\n",
    "none": b"$-1\r\n",
    "huge": b"*8\r\n" + b":9223372036854775807\r\n" * 5 + b"$1\r\na\r\n:1\r\n:0\r\n",
    "negative": b"*8\r\n" + b":-1\r\n" * 5 + b"$1\r\na\r\n:1\r\n:0\r\n",
    "nested": b"*8\r\n" + b"*1\r\n:1\r\n" * 8,
    "no protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


@pytest.mark.parametrize("name", REPLIES)
def test_an_impossible_script_reply_is_an_ordinary_error(name: str) -> None:
    with listener(lambda sock: sock.sendall(REPLIES[name])) as port:
        link = RedisLink(Config(redis_url=f"redis://127.0.0.1:{port}"))
        with pytest.raises((redis.RedisError, TypeError, ValueError, AttributeError)) as caught:
            link.send(HEARTBEAT)
        assert kind_of(caught.value) in ("other", "connection")


@pytest.mark.fault("Redis replies byte by byte")
def test_clients_do_not_notice_a_redis_that_replies_byte_by_byte(notes: Notes) -> None:
    with listener(trickle) as port, Running("--redis-url", f"redis://127.0.0.1:{port}") as server:
        assert server.wait_for("cluster.lost")["gserver.kind"] == "timeout"
        assert server.who() == 1
        agent = server.agents()
        time.sleep(3)
        assert server.agents() == agent
        assert not server.events("agent.hung")
    notes.happened("the agent abandoned it")


@pytest.mark.fault("Sentinels reply byte by byte")
def test_sentinels_that_reply_byte_by_byte_are_abandoned_in_one_attempt(notes: Notes) -> None:
    with listener(trickle) as one, listener(trickle) as other:
        url = f"redis+sentinel://127.0.0.1:{one},127.0.0.1:{other}/name"
        with Running("--redis-url", url) as server:
            assert server.wait_for("cluster.lost")["gserver.kind"] == "timeout"
    notes.happened("the agent abandoned all of them")


def test_a_password_that_redis_repeats_in_an_error_is_not_logged() -> None:
    password, sentinels = SECRETS
    one = "?password=hush-hush"
    both = f"{one}&sentinel_password=qui%20et%2F"
    for scheme, path, args in (
        ("redis", one, f"'{password}'"),
        ("redis+sentinel", f"name{both}", f"'{password}' '{sentinels}'"),
    ):
        echo = f"-ERR unknown command 'AUTH', with args beginning with: {args} \r\n".encode()
        with listener(methodcaller("sendall", echo)) as port:
            url = f"{scheme}://127.0.0.1:{port}/{path}"
            with Running(env={"REDIS_URL": url}) as server:
                lost = server.wait_for("cluster.lost")
                assert "***" in lost["error.message"]
                server.stop()
            assert not re.search("hush|qui.{0,3}et", server.stderr + "".join(server.lines))


@pytest.mark.parametrize(
    "words",
    [
        b"*0\r\n",
        b"*1\r\n$1\r\na\r\n",
        b"*2\r\n$1\r\na\r\n$1\r\nb\r\n",
        b":1\r\n",
        b"*2\r\n*0\r\n*0\r\n",
        b"*-1\r\n",
    ],
)
def test_after_a_sentinel_with_a_malformed_reply_the_next_one_is_asked(
    tmp_path: Path, words: bytes
) -> None:
    with (
        Redis(tmp_path) as server,
        listener(lambda sock: sock.sendall(2 * words)) as odd,
        listener(lambda sock: sock.sendall(2 * named(server.port))) as honest,
    ):
        link = RedisLink(
            Config(redis_url=f"redis+sentinel://127.0.0.1:{odd},127.0.0.1:{honest}/name")
        )
        sentinels = ask_first(link, odd)
        assert link.send(HEARTBEAT).servers == 1
        assert sentinels.addresses[0][1] == honest
        sentinels._check_at = 0  # A check is due.
        assert not sentinels.has_moved()
        assert sentinels.addresses[0][1] == odd
        link.drop()


@pytest.mark.fault("One of two Sentinels lies")
def test_after_a_sentinel_that_names_a_wrong_address_the_next_one_is_asked(
    tmp_path: Path, notes: Notes
) -> None:
    with (  # Each connection replies to both requests.
        Redis(tmp_path) as server,
        listener(lambda sock: sock.sendall(2 * named(1))) as liar,
        listener(lambda sock: sock.sendall(2 * named(server.port))) as honest,
    ):
        link = RedisLink(
            Config(redis_url=f"redis+sentinel://127.0.0.1:{liar},127.0.0.1:{honest}/name")
        )
        ask_first(link, liar)

        def is_acknowledged() -> bool:
            try:
                return link.send(HEARTBEAT).total_clients == 5
            except OSError:
                return False
            except redis.RedisError as error:
                return kind_of(error) != "connection"

        assert not is_acknowledged()
        assert is_acknowledged()
        link.drop()
    notes.happened("the wrong Sentinel was asked first")


def test_an_update_on_disk_that_the_agent_cannot_run_does_not_end_the_server(
    tmp_path: Path,
) -> None:
    shutil.copytree(ROOT / "gserver", tmp_path / "gserver")
    options = ("--statsd-host", "127.0.0.1")
    with Running(*options, env={"PYTHONPATH": str(tmp_path)}) as server, server.client() as client:
        assert client.who() == 1
        scoreboard = tmp_path / "gserver/scoreboard.py"
        text = scoreboard.read_text()
        assert text.count("MAX_COMMANDS = 64") == 1
        scoreboard.write_text(text.replace("MAX_COMMANDS = 64", "MAX_COMMANDS = 65"))
        (agent,) = until(server.agents, "the agent runs")
        agent.kill()
        until(
            lambda: len(server.events("agent.died")) >= 2,
            "the next agent does not start either",
            2 * LIMIT,
        )
        assert client.who() == 1
        assert not server.events("server.draining")


@pytest.mark.fault("A reply of Redis has endless parts")
def test_a_reply_with_endless_elements_is_abandoned_at_once(notes: Notes) -> None:
    """Otherwise the agent would do nothing else while it parses them."""

    def pour(sock: socket.socket) -> None:
        sock.sendall(b"*2000000000\r\n")
        while True:
            sock.sendall(b":1\r\n" * 250_000)

    with listener(pour) as port, Running("--redis-url", f"redis://127.0.0.1:{port}") as server:
        assert server.wait_for("cluster.lost", limit=4 * PATIENCE)["gserver.kind"] == "other"
        assert server.who() == 1
    notes.happened("the agent abandoned it")


@pytest.mark.fault("A reply of Redis never ends")
def test_an_endless_reply_is_abandoned_before_it_fills_the_memory(notes: Notes) -> None:
    def pour(sock: socket.socket) -> None:
        sock.sendall(b"$9000000000\r\n")
        while True:
            sock.sendall(bytes(1_000_000))

    with listener(pour) as port, Running("--redis-url", f"redis://127.0.0.1:{port}") as server:
        until(lambda: server.events("cluster.lost"), "the reply is abandoned")
        (agent,) = server.agents()
        said = (
            Path(f"/proc/{agent.pid}/status").read_text()
            + Path(f"/proc/{agent.pid}/limits").read_text()
        )
        found = re.search(rf"VmHWM:\s+(\d+) kB.*\nMax data size +{MAX_DATA_BYTES} ", said, re.S)
        assert found, said
        assert 50_000 < int(found[1]) < MAX_DATA_BYTES / 1000, (
            "the agent has received much, and kept no more than its limit"
        )
        assert server.who() == 1
    notes.happened("the agent abandoned it")
