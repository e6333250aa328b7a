"""The faults that other tests rely on without observing the fault and its end themselves."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lab.redises import Proxy, Redis, Sentinels
from lab.running import LIMIT, until

#: Seconds without a reply that count as silence.
SILENCE = 0.3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Redis]:
    with Redis(tmp_path) as running:
        yield running


def connected(port: int, limit: float = LIMIT) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), limit)


def ping(client: socket.socket) -> bytes:
    client.sendall(b"PING\r\n")
    return client.recv(100)


def by(url: str, *words: Any, **options: Any) -> Any:
    """Send a command through a URL, like its users do."""
    options |= {"retry": Retry(NoBackoff(), 0), "socket_timeout": LIMIT}
    with redis.Redis.from_url(url, decode_responses=True, **options) as client:
        return client.execute_command(*words)


def test_a_redis_can_come_back_with_an_old_snapshot(server: Redis) -> None:
    with pytest.raises(AssertionError, match="SAVE before"):
        server.restart(keep_data=True)
    server.restart(keep_data=False)
    server.command("SET", "key", "old")
    server.command("SAVE")
    server.command("SET", "key", "new")
    server.restart(keep_data=True)
    assert server.command("GET", "key") == "old"


def test_with_appendonly_a_redis_comes_back_with_its_last_write(tmp_path: Path) -> None:
    with Redis(tmp_path, appendonly="yes") as server:
        server.command("SET", "key", "new")
        server.restart(keep_data=True)
        assert server.command("GET", "key") == "new"
        server.restart(keep_data=False)
        assert server.command("GET", "key") is None


def test_a_frozen_redis_accepts_connections_and_does_not_reply_until_it_is_thawed(
    server: Redis,
) -> None:
    server.freeze()
    with connected(server.port, SILENCE) as client:
        with pytest.raises(TimeoutError):
            ping(client)
        server.thaw()
        client.settimeout(LIMIT)
        assert client.recv(100) == b"+PONG\r\n"


def test_a_bad_option_fails_with_the_message_of_redis(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"Bad directive|Unresolved Configuration"):
        Redis(tmp_path, no_such_option=1)


def test_all_processes_end_with_the_block(tmp_path: Path) -> None:
    with Redis(tmp_path) as server, Proxy(server.port) as proxy:
        process = psutil.Process(server.process.pid)
        server.freeze()
    assert not process.is_running()
    for port in (server.port, proxy.port):
        with pytest.raises(ConnectionRefusedError):
            connected(port)


def test_sentinels_name_a_primary_and_replace_it(tmp_path: Path) -> None:
    with Sentinels(tmp_path, "name", password="secret", sentinel_password="other") as sentinels:
        ports = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels.sentinels)
        assert sentinels.url == f"redis+sentinel://:secret@{ports}/name?sentinel_password=other"
        assert [one.role() for one in sentinels.redises] == ["master", "slave", "slave"]
        assert sentinels.primary() is sentinels.redises[0]

        first = sentinels.failover()
        second = sentinels.primary()
        expected = (True, False, "master")
        assert (first is sentinels.redises[0], first is second, second.role()) == expected

        assert sentinels.kill_primary() is second
        third = sentinels.primary()
        assert (second.is_running(), third is second, third.role()) == (False, False, "master")
        assert second.role() == ""


def test_sentinels_replace_a_frozen_primary_and_for_a_while_there_are_two(tmp_path: Path) -> None:
    with Sentinels(tmp_path) as sentinels:
        assert sentinels.url.endswith("/gserver")
        first = sentinels.freeze_primary()
        assert not first.is_running()
        assert sentinels.primary().role() == "master"
        first.thaw()
        assert first.role() == "master", "Sentinels wait some seconds before they correct it"


@pytest.fixture
def proxy(server: Redis) -> Iterator[Proxy]:
    with Proxy(server.port) as running:
        yield running


def test_a_proxy_forwards_and_counts(server: Redis, proxy: Proxy) -> None:
    with connected(proxy.port) as client:
        assert ping(client) == b"+PONG\r\n"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    assert by(server.url_at(proxy.port), "PING") is True
    with Proxy(server.port) as other, connected(other.port) as client:
        ping(client)
        assert (other.bytes_to_server, other.bytes_to_client, other.bytes_dropped) == (6, 7, 0)


@pytest.mark.parametrize("switch", ["drop_requests", "is_dropping"])
def test_a_proxy_loses_requests(server: Redis, proxy: Proxy, switch: str) -> None:
    setattr(proxy, switch, True)
    with connected(proxy.port, SILENCE) as client:
        client.sendall(b"SET key value\r\n")
        with pytest.raises(TimeoutError):
            client.recv(100)
        until(lambda: proxy.bytes_dropped == len(b"SET key value\r\n"), "the request is lost")
        assert proxy.bytes_to_server == 0
        assert server.command("GET", "key") is None
        setattr(proxy, switch, False)
        client.settimeout(LIMIT)
        assert ping(client) == b"+PONG\r\n"


def test_a_proxy_cuts_both_sides_and_accepts_new_connections(server: Redis, proxy: Proxy) -> None:
    with connected(proxy.port) as client, connected(proxy.port) as other:
        assert {ping(client), ping(other)} == {b"+PONG\r\n"}
        proxy.cut()
        for cut in (client, other):
            with pytest.raises(ConnectionResetError):
                cut.recv(100)
    until(
        lambda: server.command("INFO", "clients")["connected_clients"] == 1,
        "only this connection is left at the server",
    )
    with connected(proxy.port) as client:
        assert ping(client) == b"+PONG\r\n"


def test_a_proxy_before_a_dead_server_resets(server: Redis, proxy: Proxy) -> None:
    server.kill()
    with pytest.raises(ConnectionResetError), connected(proxy.port) as client:
        client.recv(100)
