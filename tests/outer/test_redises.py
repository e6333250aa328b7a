"""The faults that other tests rely on: each can be seen from outside, and so can its end."""

import socket
import time
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
#: A script that writes, like the heartbeat.
WRITE = ("EVAL", "return redis.call('SET', 'key', 'script')", 1, "key")


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
    """Send a command through a URL, as a user of it does."""
    options |= {"retry": Retry(NoBackoff(), 0), "socket_timeout": LIMIT}
    with redis.Redis.from_url(url, decode_responses=True, **options) as client:
        return client.execute_command(*words)


def test_a_killed_redis_refuses_and_comes_back_empty_on_the_same_port(server: Redis) -> None:
    server.command("SET", "key", "old")
    server.command("SAVE")
    server.kill()
    with pytest.raises(ConnectionRefusedError):
        connected(server.port)
    server.restart(keep_data=False)
    assert by(f"redis://127.0.0.1:{server.port}", "GET", "key") is None


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


def test_a_frozen_redis_can_be_killed(server: Redis) -> None:
    server.freeze()
    server.kill()
    assert not server.is_running()
    server.restart(keep_data=False)
    assert server.is_running()


def test_a_wiped_redis_has_no_data(server: Redis) -> None:
    server.command("SET", "key", "value")
    server.wipe()
    assert server.command("DBSIZE") == 0


def test_a_read_only_redis_refuses_writes_and_keeps_its_data(server: Redis) -> None:
    server.command("SET", "key", "value")
    server.read_only()
    for write in (("SET", "key", "other"), WRITE):
        with pytest.raises(redis.ReadOnlyError):
            server.command(*write)
    assert (server.role(), server.command("GET", "key")) == ("slave", "value")
    server.writable()
    assert server.command(*WRITE) == "OK"


def test_a_redis_out_of_memory_refuses_writes(server: Redis) -> None:
    server.out_of_memory()
    for write in (("SET", "key", "value"), WRITE):
        with pytest.raises(redis.OutOfMemoryError):
            server.command(*write)
    server.enough_memory()
    assert server.command(*WRITE) == "OK"


def test_a_redis_forgets_scripts(server: Redis) -> None:
    digest = server.command("SCRIPT", "LOAD", WRITE[1])
    assert server.command("EVALSHA", digest, 1, "key") == "OK"
    server.forget_scripts()
    with pytest.raises(redis.exceptions.NoScriptError):
        server.command("EVALSHA", digest, 1, "key")


def test_members_are_returned_with_their_counts(server: Redis) -> None:
    assert server.members() == {}
    server.command("HSET", "{gserver:gserver}:members", "a", "3 170000 x", "b", "0 170001 y")
    server.command("HSET", "{gserver:other}:members", "c", "5 170000 z")
    assert (server.members(), server.members("other")) == ({"a": 3, "b": 0}, {"c": 5})


def test_options_are_those_of_redis(tmp_path: Path) -> None:
    with Redis(tmp_path, maxmemory="5mb", maxmemory_policy="allkeys-lru") as server:
        assert server.command("CONFIG", "GET", "maxmemory*policy") == [
            "maxmemory-policy",
            "allkeys-lru",
        ]
        assert server.command("CONFIG", "GET", "maxmemory") == ["maxmemory", str(5 * 2**20)]


def test_a_bad_option_fails_with_the_message_of_redis(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="Bad directive"):
        Redis(tmp_path, no_such_option=1)


def test_a_password_is_needed_and_in_the_urls(tmp_path: Path) -> None:
    with Redis(tmp_path, requirepass="secret") as server:
        with pytest.raises(redis.AuthenticationError):
            by(f"redis://127.0.0.1:{server.port}", "PING")
        assert [by(url, "PING") for url in (server.url, server.unix_url)] == [True, True]


def test_the_tls_certificate_is_signed_by_its_own_ca_only(tmp_path: Path) -> None:
    with Redis(tmp_path, is_tls=True) as server:
        assert server.url.startswith("rediss://")
        assert by(server.url, "PING", ssl_ca_certs=str(server.ca_file)) is True
        with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            by(server.url, "PING", ssl_ca_certs=str(server.other_ca_file))
        with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            by(
                server.url.replace("127.0.0.1", "localhost"),
                "PING",
                ssl_ca_certs=str(server.ca_file),
            )
        with pytest.raises(redis.ConnectionError):
            by(server.url.replace("rediss", "redis"), "PING")


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
        assert (first is sentinels.redises[0], first is second, second.role()) == (
            True,
            False,
            "master",
        )

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


def test_a_proxy_delays(proxy: Proxy) -> None:
    with connected(proxy.port) as client:
        proxy.delay_seconds = 0.1
        start = time.monotonic()
        assert ping(client) == b"+PONG\r\n"
        assert time.monotonic() - start >= 0.2, "once each way"


def test_a_proxy_loses_the_reply_to_a_command_that_ran(server: Redis, proxy: Proxy) -> None:
    proxy.drop_replies = True
    with connected(proxy.port, SILENCE) as client:
        client.sendall(b"SET key value\r\n")
        with pytest.raises(TimeoutError):
            client.recv(100)
        until(lambda: proxy.bytes_dropped == len(b"+OK\r\n"), "the reply is lost")
        assert server.command("GET", "key") == "value"
        proxy.drop_replies = False
        client.settimeout(LIMIT)
        assert ping(client) == b"+PONG\r\n"


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


def test_a_proxy_refuses_and_accepts_again(proxy: Proxy) -> None:
    with connected(proxy.port) as client:
        ping(client)
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            client.recv(100)
        with pytest.raises(ConnectionRefusedError):
            connected(proxy.port)
    proxy.accept()
    with connected(proxy.port) as client:
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
