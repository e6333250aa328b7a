"""The connection to real Redis servers: requests, closing after errors, and kinds of errors."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from gserver.cluster.membership import Heartbeat, Reply
from gserver.cluster.redis_link import (
    HEARTBEAT_SCRIPT,
    TIMEOUT_SECONDS,
    RedisLink,
    kind_of,
    sha1_of,
)
from gserver.config import Config
from gserver.redis_errors import HEARTBEAT_ERRORS
from gserver.redis_url import RedisUrl
from lab import redis_faults as faults
from lab.impostor import listener
from lab.redis_faults import RedisFault, switched
from lab.redises import Proxy, Redis, Sentinels, Server, free_port
from lab.running import PATIENCE, until

TTL, INTERVAL = 60_000, 6000
#: Time that a reply may take beyond the timeout.
SLACK = 1.5 * PATIENCE
#: Passwords, which no error may contain. An address is shown without user names, too, but Redis 8
#: names the user in its errors.
SECRETS = ("hush-1", "hush-2")
USERS = ("bobby", "evelyn")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def server(shared: Redis) -> Redis:
    """The Redis of this file, empty."""
    shared.wipe()
    shared.forget_scripts()
    return shared


@contextmanager
def linked(url: str, **options: Any) -> Iterator[RedisLink]:
    link = RedisLink(Config(redis_url=url, **options))
    try:
        yield link
    finally:
        link.drop()


@contextmanager
def locked(server: Redis, password: str) -> Iterator[None]:
    """Make Redis require a password."""
    server.command("ACL", "SETUSER", "default", f">{password}")
    server.password = password
    try:
        yield
    finally:
        server.command("ACL", "SETUSER", "default", "nopass")
        server.password = ""


def send_heartbeat(link: RedisLink, clients: int = 1, incarnation: str = "a1") -> Reply:
    sequence = time.monotonic_ns() // 1000
    return link.send(Heartbeat("one", incarnation, sequence, clients, TTL, INTERVAL))


def failed(link: RedisLink) -> Exception:
    """Return the error of a heartbeat that must fail."""
    with pytest.raises((redis.RedisError, OSError, UnicodeError)) as caught:
        send_heartbeat(link)
    return caught.value


def calls(server: Redis) -> dict[str, int]:
    """Return the number of calls of each command since the last time."""
    stats = server.command("INFO", "commandstats")
    server.command("CONFIG", "RESETSTAT")
    return {name.removeprefix("cmdstat_"): fields["calls"] for name, fields in stats.items()}


def errors(server: Redis) -> int:
    """Return how many commands Redis has rejected, including some of this test's own."""
    return int(server.command("INFO", "stats")["total_error_replies"])


def connections(server: Redis) -> list[dict[str, str]]:
    """Return all connections except this test's own."""
    found: list[dict[str, str]] = server.command("CLIENT LIST")
    return [client for client in found if client["cmd"] != "client|list"]


def test_a_reply_has_its_names_and_texts(server: Redis) -> None:
    with linked(server.url) as link:
        reply = send_heartbeat(link, 5)
        assert reply == Reply(5, 1, 0, reply.clock, reply.clock, "a1", reply.clock + TTL, 0, 0, 0)


def test_the_script_is_sent_only_when_redis_does_not_know_it(server: Redis) -> None:
    with linked(server.url) as link:
        for _ in range(2):
            server.forget_scripts()
            calls(server)
            for clients in (1, 2, 3):
                assert send_heartbeat(link, clients).total_clients == clients
            counted = calls(server)
            assert (counted["eval"], counted["evalsha"]) == (1, 3)
            assert server.command("SCRIPT", "EXISTS", sha1_of(HEARTBEAT_SCRIPT)) == [True]


def test_there_is_one_connection_which_is_opened_for_the_first_heartbeat(server: Redis) -> None:
    with linked(server.url) as link:
        assert connections(server) == []
        send_heartbeat(link)
        (first,) = connections(server)
        send_heartbeat(link)
        (second,) = connections(server)
        assert first["id"] == second["id"]
        link.drop()
        until(lambda: not connections(server), "the connection is closed")
        link.drop()
        assert send_heartbeat(link).total_clients == 1


def test_an_ordinary_heartbeat_is_one_request_and_a_connect_needs_no_other(server: Redis) -> None:
    with linked(server.url) as link:
        send_heartbeat(link)
        calls(server)
        send_heartbeat(link)
        asked = {"evalsha"} | {
            "time",
            "hlen",
            "zcard",
            "hmget",
            "hget",
            "hset",
            "zadd",
            "zrange",
            "zrangebyscore",
        }
        assert set(calls(server)) - {"zcount", "zscore", "config|resetstat"} == asked
        first, second = errors(server), errors(server)
        link.drop()
        send_heartbeat(link)
        assert errors(server) - second == second - first, "every command is known to an old Redis"
        assert (
            set(calls(server))
            & {"hello", "client|setinfo", "client|setname", "ping", "select", "auth"}
            == set()
        )


def test_clusters_of_different_names_have_different_keys(server: Redis) -> None:
    with (
        linked(server.url, cluster_name="blue") as blue,
        linked(server.url, cluster_name="green") as green,
    ):
        send_heartbeat(blue, 5)
        assert send_heartbeat(green, 20).total_clients == 20
        assert sorted(server.command("KEYS", "*")) == sorted(blue.keys + green.keys)
        assert all(key.startswith("{gserver:blue}:") for key in blue.keys)


# Addresses and logins


def test_the_keys_are_in_the_database_that_the_url_names(server: Redis) -> None:
    for url, database in (
        (f"{server.url}/3", "db3"),
        (f"{server.url}?db=4", "db4"),
        (f"{server.unix_url}?db=5", "db5"),
    ):
        with linked(url) as link:
            send_heartbeat(link)
            send_heartbeat(link)
        assert server.command("INFO", "keyspace")[database]["keys"] == 3


@pytest.mark.parametrize("kind", ["password", "user"])
def test_a_password_or_a_user_with_few_rights_suffices(server: Redis, kind: str) -> None:
    rights = ["+eval", "+evalsha", "+time", "+expire", "+del", "+@hash", "+@sortedset"]
    server.command(
        "ACL", "SETUSER", "bobby", "reset", "on", ">hush-1", "~{gserver:gserver}:*", *rights
    )
    with locked(server, "hush-2"):
        login = "bobby:hush-1" if kind == "user" else ":hush-2"
        with linked(f"redis://{login}@127.0.0.1:{server.port}") as link:
            assert send_heartbeat(link, 5).total_clients == 5
            (client,) = connections(server)
            assert client["user"] == ("bobby" if kind == "user" else "default")
    server.command("ACL", "DELUSER", "bobby")


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("tls"), is_tls=True) as running:
        yield running


def test_tls_and_plain_do_not_understand_each_other(server: Redis, encrypted: Redis) -> None:
    with linked(encrypted.url.replace("rediss", "redis")) as link:
        assert kind_of(failed(link)) in ("connection", "timeout")
    with linked(server.url.replace("redis", "rediss"), redis_tls_verify="no") as link:
        assert kind_of(failed(link)) in ("tls", "timeout")


# Errors


@contextmanager
def unreachable(server: Redis) -> Iterator[str]:
    """A connect that the kernel does not answer: the accept queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"redis://{BOBBY}@127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def silent_tls(server: Redis) -> Iterator[str]:
    """No reply to the ClientHello."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"rediss://bobby:hush-1@127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def no_reply(server: Redis) -> Iterator[str]:
    """The network loses the replies of Redis."""
    with Proxy(server.port) as proxy:
        proxy.drop_replies = True
        yield server.url_at(proxy.port)


BOBBY, EVELYN = "bobby:hush-1", "sentinel_username=evelyn&sentinel_password=hush-2"
Start = Callable[[Redis], AbstractContextManager[str]]


def at(url: Callable[[Redis], str], *around: RedisFault) -> Start:
    """The URL of the link while Redis has these faults."""

    @contextmanager
    def begin(server: Redis) -> Iterator[str]:
        with ExitStack() as stack:
            for fault in around:
                stack.enter_context(fault(server))
            yield url(server)

    return begin


def its_url(server: Redis) -> str:
    return server.url


def url_of_bobby(server: Redis) -> str:
    return f"redis://{BOBBY}@127.0.0.1:{server.port}"


def may_only(*rights: str) -> RedisFault:
    """Bobby is a user with these rights only."""
    return switched(
        "may_only",
        lambda server: server.command(
            "ACL", "SETUSER", "bobby", "reset", "on", ">hush-1", "~*", *rights
        ),
        lambda server: server.command("ACL", "DELUSER", "bobby"),
    )


@contextmanager
def another_server(says: bytes) -> Iterator[str]:
    """A server that accepts a connection, sends this and closes."""
    with listener(lambda sock: sock.sendall(says)) as port:
        yield f"redis://{BOBBY}@127.0.0.1:{port}"


@contextmanager
def frozen_sentinel(server: Redis) -> Iterator[str]:
    with unreachable(server) as url:
        yield f"{url.replace('redis:', 'redis+sentinel:')}/name?{EVELYN}"


#: Each fault, its kind, and a word of the reason that an operator would search for.
FAULTS: dict[str, tuple[Start, str, str]] = {
    "refused": (at(lambda _: f"redis://{BOBBY}@127.0.0.1:{free_port()}"), "connection", "refused"),
    "no socket": (
        at(lambda server: f"unix://{BOBBY}@{server.folder}/none.sock"),
        "connection",
        "none.sock",
    ),
    "closed": (lambda _: another_server(b""), "connection", "reset|closed"),
    "not Redis": (lambda _: another_server(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "other", "HTTP"),
    "wrong password": (at(url_of_bobby), "auth", "invalid username-password pair"),
    "no password": (
        at(lambda server: f"redis://127.0.0.1:{server.port}", partial(locked, password="hush-1")),
        "auth",
        "[Aa]uthenticat",
    ),
    "no rights": (at(url_of_bobby, may_only("+get")), "auth", "permissions"),
    "no rights in the script": (
        at(url_of_bobby, may_only("+eval", "+evalsha")),
        "auth",
        "can't run this command|no permissions",
    ),
    "no name": (at(lambda _: f"redis://{BOBBY}@[::1%25dead]:1"), "name", "::1%dead"),
    "impossible name": (at(lambda _: f"redis://{BOBBY}@{'a' * 64}:1"), "name", "too long"),
    "frozen": (at(its_url, faults.frozen), "timeout", "Timeout"),
    "frozen before the login": (at(url_of_bobby, faults.frozen), "timeout", "Timeout"),
    "unreachable": (unreachable, "timeout", "Timeout"),
    "silent TLS": (silent_tls, "timeout", "[Tt]imed? ?out"),
    "no reply": (no_reply, "timeout", "Timeout"),
    "read only": (at(its_url, faults.read_only), "read_only", "read only replica"),
    "out of memory": (at(its_url, faults.out_of_memory), "out_of_memory", "maxmemory"),
    "loading": (at(its_url, faults.loading), "loading", "loading"),
    "too few replicas": (at(its_url, faults.too_few_replicas), "no_replicas", "NOREPLICAS"),
    "busy": (at(its_url, faults.busy), "busy", "BUSY"),
    "full": (at(its_url, faults.full), "connection", "reset|not ready|max number of clients"),
    "no Sentinels": (
        at(
            lambda _: (
                f"redis+sentinel://{BOBBY}@127.0.0.1:{free_port()},127.0.0.1:{free_port()}/name?{EVELYN}"
            )
        ),
        "no_primary",
        "refused",
    ),
    "unreachable Sentinel": (frozen_sentinel, "no_primary", "Timeout"),
}


@pytest.mark.parametrize(("fault", "kind", "word"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_reported_in_time_with_its_kind_and_no_secret(
    server: Redis, fault: Start, kind: str, word: str
) -> None:
    with fault(server) as url, linked(url) as link:
        began = time.monotonic()
        error = failed(link)
        took = time.monotonic() - began
    assert kind_of(error) == kind
    assert took < TIMEOUT_SECONDS + SLACK
    if kind == "timeout":
        assert took >= 0.9 * TIMEOUT_SECONDS
    with pytest.raises(type(error), match=word):
        raise error
    for text in (str(error), repr(error), str(link)):
        assert not any(secret in text for secret in SECRETS)
        assert len(text.splitlines()) == 1
    assert not any(user in str(link) for user in USERS)


@pytest.mark.parametrize(
    "fault",
    [faults.read_only, faults.out_of_memory, faults.too_few_replicas, faults.busy],
    ids=lambda fault: str(fault.__name__),
)
def test_after_any_error_the_connection_is_closed_and_the_next_heartbeat_opens_another(
    server: Redis, fault: RedisFault
) -> None:
    with linked(server.url) as link:
        send_heartbeat(link)
        (before,) = connections(server)
        with fault(server):
            failed(link)
        until(
            lambda: all(client["id"] != before["id"] for client in connections(server)),
            "the connection is closed",
        )
        assert send_heartbeat(link, 7).total_clients == 7


def test_a_connection_closed_between_two_heartbeats_loses_nothing(server: Redis) -> None:
    with linked(server.url) as link:
        send_heartbeat(link)
        (before,) = connections(server)
        assert server.command("CLIENT", "KILL", "ID", before["id"]) == 1
        assert send_heartbeat(link, 7).total_clients == 7
        (after,) = connections(server)
        assert after["id"] != before["id"]


def test_a_late_reply_is_never_mistaken_for_the_next_one(server: Redis) -> None:
    """The network delays a reply for longer than the timeout, then delivers everything."""
    with Proxy(server.port) as proxy, linked(server.url_at(proxy.port)) as link:
        send_heartbeat(link)
        for clients in range(1, 4):
            proxy.delay_seconds = TIMEOUT_SECONDS
            assert kind_of(failed(link)) == "timeout"
            proxy.delay_seconds = 0.0
            until(
                lambda: server.command("EXISTS", *link.keys) == 3, "the first heartbeat has arrived"
            )
            assert send_heartbeat(link, 100 + clients).total_clients == 100 + clients


def test_a_late_heartbeat_to_a_frozen_redis_changes_nothing(server: Redis) -> None:
    with linked(server.url) as link:
        send_heartbeat(link, 5)
        with faults.frozen(server):
            assert kind_of(failed(link)) == "timeout"
        assert send_heartbeat(link, 7).total_clients == 7
        assert send_heartbeat(link, 8).total_clients == 8
        assert server.members() == {"one": 8}


def test_the_timeout_is_at_most_a_tenth_of_the_ttl(server: Redis) -> None:
    with (
        faults.frozen(server),
        linked(server.url, member_ttl_seconds=1.0, heartbeat_interval_seconds=0.1) as link,
    ):
        began = time.monotonic()
        assert kind_of(failed(link)) == "timeout"
        assert time.monotonic() - began >= 0.09
    assert (
        link._options["socket_timeout"]
        == link._options["socket_connect_timeout"]
        == pytest.approx(0.1)
    )


def test_a_redis_that_cannot_save_is_a_separate_kind_of_error(tmp_path: Path) -> None:
    with Redis(tmp_path) as server, linked(server.url) as link:
        send_heartbeat(link)
        with faults.cannot_save(server):
            error = failed(link)
            assert kind_of(error) == "cannot_save"
            assert "MISCONF" in str(error)
            server.command("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
            assert send_heartbeat(link, 7).total_clients == 7


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            redis.ResponseError("-READONLY You can't write against a read only replica."),
            "read_only",
        ),
        (
            redis.ResponseError("Error running script: @user_script:4: -OOM command not allowed"),
            "out_of_memory",
        ),
        (redis.ResponseError("Error running script: -NOPERM this user has no permissions"), "auth"),
        (  # Redis 7.0
            redis.ResponseError(
                "The user executing the script can't run this command or subcommand"
                " script: 6493bab5, on @user_script:13."
            ),
            "auth",
        ),
        (  # Redis 8.2
            redis.ResponseError(
                "ACL failure in script: User bobby has no permissions to run the 'time' command"
                " script: 6493bab5, on @user_script:13."
            ),
            "auth",
        ),
        (  # Valkey 9.1
            redis.ResponseError(
                "ACL failure in script: User bobby has no permissions to run the 'hset' command"
                " script: on @user_script:49."
            ),
            "auth",
        ),
        # A host name that cannot be encoded: Python 3.11, then 3.13.
        (UnicodeError("encoding with 'idna' codec failed (UnicodeError: label too long)"), "name"),
        (UnicodeEncodeError("idna", "a" * 64, 0, 64, "label too long"), "name"),
        # A reply that is not UTF-8 is not about a name.
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "other"),
        (redis.BusyLoadingError("Redis is loading the dataset in memory"), "loading"),
        (BrokenPipeError(32, "Broken pipe"), "other"),
        (redis.ConnectionError("Error 32 while writing to socket. Broken pipe."), "connection"),
        (ValueError("not enough values"), "other"),
    ],
)
def test_errors_of_other_versions_of_redis_and_python_have_their_kinds_too(
    error: Exception, kind: str
) -> None:
    assert kind_of(error) == kind


def test_every_kind_is_tested_here() -> None:
    assert {kind for _, kind, _ in FAULTS.values()} | {"tls", "cannot_save"} == set(
        HEARTBEAT_ERRORS
    )


# Sentinels


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Redis, Server]]:
    """A Redis with a password, and a Sentinel with another password."""
    with Redis(tmp_path, requirepass="hush-1") as server:
        rules = [f"monitor name 127.0.0.1 {server.port} 1", "auth-pass name hush-1"]
        lines = ["port PORT", *(f"sentinel {rule}" for rule in rules)]
        with Server("redis-sentinel", tmp_path, lines, "hush-2") as sentinel:
            yield server, sentinel


def sentinel_url(*ports: int, service: str = "name", password: str = "hush-2") -> str:
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"redis+sentinel://:hush-1@{hosts}/{service}?sentinel_password={password}"


def test_sentinels_give_the_address_of_redis_even_if_some_are_dead(
    watched: tuple[Redis, Server],
) -> None:
    server, sentinel = watched
    for _ in range(4):  # The order in which they are asked is random.
        with linked(sentinel_url(free_port(), sentinel.port, free_port())) as link:
            assert send_heartbeat(link, 5).total_clients == 5
            assert server.members() == {"one": 5}


def test_sentinels_without_the_service_or_with_another_password_are_reported_without_secrets(
    watched: tuple[Redis, Server],
) -> None:
    _, sentinel = watched
    for url in (
        sentinel_url(sentinel.port, service="else"),
        sentinel_url(sentinel.port, password="hush-1"),
    ):
        with linked(url) as link:
            error = failed(link)
            assert kind_of(error) in ("no_primary", "auth")
            assert not any(secret in f"{error} {error!r} {link}" for secret in SECRETS)


def test_after_an_error_the_sentinels_are_asked_again(
    watched: tuple[Redis, Server], tmp_path: Path
) -> None:
    server, sentinel = watched
    with (
        Redis(tmp_path, requirepass="hush-1") as another,
        linked(sentinel_url(sentinel.port)) as link,
    ):
        send_heartbeat(link, 5)
        sentinel.command("SENTINEL", "REMOVE", "name")
        sentinel.command("SENTINEL", "MONITOR", "name", "127.0.0.1", another.port, 1)
        server.kill()
        failed(link)
        assert send_heartbeat(link, 7).total_clients == 7
        assert another.members() == {"one": 7}


def test_the_url_of_a_link_is_written_without_secrets() -> None:
    with linked(sentinel_url(1, 2)) as link:
        assert (
            str(link)
            == str(RedisUrl.parse(sentinel_url(1, 2)))
            == "redis+sentinel://127.0.0.1:1,127.0.0.1:2/name"
        )


def test_a_server_follows_sentinels_that_were_all_set_up_again(tmp_path: Path) -> None:
    """They count failovers from 0 again, like a Sentinel that missed the last failover."""
    with Sentinels(tmp_path) as sentinels:
        sentinels.failover()
        link = RedisLink(
            Config(redis_url=sentinels.url, member_ttl_seconds=2.0, heartbeat_interval_seconds=0.2)
        )

        def reports_to(redis: Redis) -> bool:
            link.send(Heartbeat("one", f"{time.monotonic_ns():x}", 1, 1, 2000, 200))
            return redis.members() != {}

        before = sentinels.primary()
        assert reports_to(before)
        other = next(each for each in sentinels.redises if each is not before)
        for sentinel in sentinels.sentinels:
            sentinel.command("SENTINEL", "REMOVE", sentinels.name)
        other.command("REPLICAOF", "NO", "ONE")
        other.wipe()
        for sentinel in sentinels.sentinels:
            sentinel.command("SENTINEL", "MONITOR", sentinels.name, "127.0.0.1", other.port, 2)
        until(lambda: reports_to(other), "the server follows the new Sentinels")
        link.drop()
