"""The connection to Redis, with real servers: what it asks, that it is given up after any error,
and errors' names.
"""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from gserver.cluster.membership import Reply
from gserver.cluster.redis_link import SCRIPT, TIMEOUT_SECONDS, RedisLink, kind_of, sha_of
from gserver.config import Config
from gserver.redis_errors import HEARTBEAT_ERRORS
from gserver.redis_url import RedisUrl
from tests.redises import Proxy, Redis, Sentinels, Server, free_port
from tests.running import LIMIT, PATIENCE, until

TTL, INTERVAL = 60_000, 6000
#: For everything in an answer that may take its time, beyond the timeout.
SLACK = 1.5 * PATIENCE
#: Whatever of it shows in an error is a leak.
SECRETS = ("hush-1", "hush-2", "bobby", "evelyn")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    slow_to_load: dict[str, Any] = {
        "enable_debug_command": "yes",
        "key_load_delay": 100,
        "loading_process_events_interval_bytes": 1024,
    }
    with Redis(
        tmp_path_factory.mktemp("redis"), busy_reply_threshold=10, **slow_to_load
    ) as running:
        yield running


@pytest.fixture
def server(shared: Redis) -> Redis:
    """The one of this file, empty."""
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
    """Have Redis want a password."""
    server.command("ACL", "SETUSER", "default", f">{password}")
    server.password = password
    try:
        yield
    finally:
        server.command("ACL", "SETUSER", "default", "nopass")
        server.password = ""


def beat(link: RedisLink, count: int = 1, incarnation: str = "a1") -> Reply:
    return link.call(
        "one", incarnation, time.monotonic_ns() // 1000, count, TTL, INTERVAL, "", 0, 0
    )


def failed(link: RedisLink) -> Exception:
    """The error of a beat that must fail."""
    with pytest.raises((redis.RedisError, OSError, UnicodeError)) as caught:
        beat(link)
    return caught.value


def calls(server: Redis) -> dict[str, int]:
    """How often each command was called since the last time."""
    stats = server.command("INFO", "commandstats")
    server.command("CONFIG", "RESETSTAT")
    return {name.removeprefix("cmdstat_"): fields["calls"] for name, fields in stats.items()}


def errors(server: Redis) -> int:
    """How many commands Redis has refused, some of those with which a test asks included."""
    return int(server.command("INFO", "stats")["total_error_replies"])


def connections(server: Redis) -> list[dict[str, str]]:
    """All connections but the one that asks."""
    found: list[dict[str, str]] = server.command("CLIENT LIST")
    return [client for client in found if client["cmd"] != "client|list"]


def test_an_answer_has_its_names_and_texts(server: Redis) -> None:
    with linked(server.url) as link:
        reply = beat(link, 5)
        assert reply == Reply(5, 1, 0, reply.clock, reply.clock, "a1", reply.clock + TTL, 0)


def test_the_script_is_sent_when_redis_does_not_know_it_and_only_then(server: Redis) -> None:
    with linked(server.url) as link:
        for _ in range(2):
            server.forget_scripts()
            calls(server)
            for count in (1, 2, 3):
                assert beat(link, count).total == count
            counted = calls(server)
            assert (counted["eval"], counted["evalsha"]) == (1, 3)
            assert server.command("SCRIPT", "EXISTS", sha_of(SCRIPT)) == [True]


def test_there_is_one_connection_which_is_made_for_the_first_beat(server: Redis) -> None:
    with linked(server.url) as link:
        assert connections(server) == []
        beat(link)
        (first,) = connections(server)
        beat(link)
        (second,) = connections(server)
        assert first["id"] == second["id"]
        link.drop()
        until(lambda: not connections(server), "it is closed")
        link.drop()
        assert beat(link).total == 1


def test_an_ordinary_beat_is_one_request_and_a_connect_asks_for_nothing_more(server: Redis) -> None:
    with linked(server.url) as link:
        beat(link)
        calls(server)
        beat(link)
        asked = {"evalsha"} | {
            "time",
            "hlen",
            "zcard",
            "hmget",
            "hget",
            "hset",
            "zadd",
            "zrangebyscore",
        }
        assert set(calls(server)) - {"zcount", "zscore", "config|resetstat"} == asked
        first, second = errors(server), errors(server)
        link.drop()
        beat(link)
        assert errors(server) - second == second - first, "nothing that an old Redis does not know"
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
        beat(blue, 5)
        assert beat(green, 20).total == 20
        assert sorted(server.command("KEYS", "*")) == sorted(blue.keys + green.keys)
        assert all(key.startswith("{gserver:blue}:") for key in blue.keys)


def said(server: Redis, word: str) -> bool:
    """Whether Redis answers with an error that has this word."""
    try:
        server.command("PING")
    except redis.RedisError as error:
        return word in str(error)
    return False


# Where Redis is


def test_a_unix_socket_is_reached_by_its_path(server: Redis) -> None:
    with linked(server.unix_url) as link:
        assert beat(link, 5).total == 5
        assert "U" in connections(server)[0]["flags"]


def test_the_data_are_in_the_database_that_the_url_names(server: Redis) -> None:
    for url, database in (
        (f"{server.url}/3", "db3"),
        (f"{server.url}?db=4", "db4"),
        (f"{server.unix_url}?db=5", "db5"),
    ):
        with linked(url) as link:
            beat(link)
            beat(link)
        assert server.command("INFO", "keyspace")[database]["keys"] == 3


@pytest.mark.parametrize("kind", ["password", "user"])
def test_a_password_or_a_user_with_few_rights_will_do(server: Redis, kind: str) -> None:
    rights = ["+eval", "+evalsha", "+time", "+expire", "+del", "+@hash", "+@sortedset"]
    server.command(
        "ACL", "SETUSER", "bobby", "reset", "on", ">hush-1", "~{gserver:gserver}:*", *rights
    )
    with locked(server, "hush-2"):
        login = "bobby:hush-1" if kind == "user" else ":hush-2"
        with linked(f"redis://{login}@127.0.0.1:{server.port}") as link:
            assert beat(link, 5).total == 5
            (client,) = connections(server)
            assert client["user"] == ("bobby" if kind == "user" else "default")
    server.command("ACL", "DELUSER", "bobby")


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("tls"), is_tls=True) as running:
        yield running


def test_tls_with_the_right_ca_is_verified(encrypted: Redis) -> None:
    with linked(encrypted.url, redis_ca_file=str(encrypted.ca_file)) as link:
        assert beat(link).servers == 1


def test_a_certificate_by_another_ca_or_for_another_name_is_no_good(encrypted: Redis) -> None:
    by_name = encrypted.url.replace("127.0.0.1", "localhost")
    for url, ca_file in (
        (encrypted.url, encrypted.other_ca_file),
        (encrypted.url, ""),
        (by_name, encrypted.ca_file),
    ):
        with linked(url, redis_ca_file=str(ca_file)) as link:
            error = failed(link)
            assert kind_of(error) == "tls"
            assert "CERTIFICATE_VERIFY_FAILED" in str(error)


def test_without_verification_any_certificate_will_do(encrypted: Redis) -> None:
    for url in (encrypted.url, encrypted.url.replace("127.0.0.1", "localhost")):
        with linked(url, redis_tls_verify="no") as link:
            assert beat(link).servers == 1


def test_tls_and_plain_do_not_understand_each_other(server: Redis, encrypted: Redis) -> None:
    with linked(encrypted.url.replace("rediss", "redis")) as link:
        assert kind_of(failed(link)) in ("connection", "timeout")
    with linked(server.url.replace("redis", "rediss"), redis_tls_verify="no") as link:
        assert kind_of(failed(link)) in ("tls", "timeout")


# Errors


@contextmanager
def refused(server: Redis) -> Iterator[str]:
    yield f"redis://bobby:hush-1@127.0.0.1:{free_port()}"


@contextmanager
def no_socket(server: Redis) -> Iterator[str]:
    yield f"unix://bobby:hush-1@{server.folder}/none.sock"


@contextmanager
def reset(server: Redis) -> Iterator[str]:
    """The network lets a connection be made, and then ends it."""

    def end() -> None:
        listener.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=end, daemon=True).start()
        yield f"redis://bobby:hush-1@127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def not_redis(server: Redis) -> Iterator[str]:
    def answer() -> None:
        client, _ = listener.accept()
        client.recv(100)
        client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        client.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def wrong_password(server: Redis) -> Iterator[str]:
    yield f"redis://bobby:hush-1@127.0.0.1:{server.port}"


@contextmanager
def no_password(server: Redis) -> Iterator[str]:
    with locked(server, "hush-1"):
        yield f"redis://127.0.0.1:{server.port}"


@contextmanager
def no_rights(server: Redis) -> Iterator[str]:
    server.command("ACL", "SETUSER", "bobby", "reset", "on", ">hush-1", "~*", "+get")
    try:
        yield f"redis://bobby:hush-1@127.0.0.1:{server.port}"
    finally:
        server.command("ACL", "DELUSER", "bobby")


@contextmanager
def no_rights_in_the_script(server: Redis) -> Iterator[str]:
    server.command("ACL", "SETUSER", "bobby", "reset", "on", ">hush-1", "~*", "+eval", "+evalsha")
    try:
        yield f"redis://bobby:hush-1@127.0.0.1:{server.port}"
    finally:
        server.command("ACL", "DELUSER", "bobby")


@contextmanager
def no_name(server: Redis) -> Iterator[str]:
    yield "redis://bobby:hush-1@[::1%25dead]:1"


@contextmanager
def impossible_name(server: Redis) -> Iterator[str]:
    yield f"redis://bobby:hush-1@{'a' * 64}:1"


@contextmanager
def frozen(server: Redis) -> Iterator[str]:
    server.freeze()
    try:
        yield server.url
    finally:
        server.thaw()


@contextmanager
def frozen_before_login(server: Redis) -> Iterator[str]:
    with frozen(server):
        yield f"redis://bobby:hush-1@127.0.0.1:{server.port}"


@contextmanager
def unreachable(server: Redis) -> Iterator[str]:
    """A connect that nobody answers, not even the kernel: the queue of who waits to be accepted is
    full.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"redis://bobby:hush-1@127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def silent_tls(server: Redis) -> Iterator[str]:
    """No answer to the first message of TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"rediss://bobby:hush-1@127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def no_answer(server: Redis) -> Iterator[str]:
    """The network loses what Redis says."""
    with Proxy(server.port) as proxy:
        proxy.drop_replies = True
        yield server.url_at(proxy.port)


@contextmanager
def read_only(server: Redis) -> Iterator[str]:
    server.read_only()
    try:
        yield server.url
    finally:
        server.writable()


@contextmanager
def out_of_memory(server: Redis) -> Iterator[str]:
    server.out_of_memory()
    try:
        yield server.url
    finally:
        server.enough_memory()


@contextmanager
def loading(server: Redis) -> Iterator[str]:
    """Redis has just been started, and reads its data."""
    server.command("DEBUG", "POPULATE", 10_000)
    server.command("SAVE")
    server.kill()
    start = threading.Thread(target=server.restart, args=[True])
    start.start()
    try:
        until(lambda: said(server, "loading"), "it loads")
        yield server.url
    finally:
        start.join(LIMIT)


@contextmanager
def too_few_replicas(server: Redis) -> Iterator[str]:
    server.command("CONFIG", "SET", "min-replicas-to-write", 1)
    try:
        yield server.url
    finally:
        server.command("CONFIG", "SET", "min-replicas-to-write", 0)


@contextmanager
def full(server: Redis) -> Iterator[str]:
    """Redis is full of other clients."""
    _, limit = server.command("CONFIG", "GET", "maxclients")
    with redis.Redis(port=server.port) as admin, ExitStack() as crowd:
        for _ in range(5):
            crowd.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        admin.config_set("maxclients", 1)
        try:
            yield server.url
        finally:
            admin.config_set("maxclients", limit)


@contextmanager
def busy(server: Redis) -> Iterator[str]:
    """Redis runs somebody's endless script."""

    def run() -> None:
        with pytest.raises(redis.ResponseError, match="killed"):
            server.command("EVAL", "while true do end", 0)

    script = threading.Thread(target=run)
    script.start()
    try:
        until(lambda: said(server, "BUSY"), "it is busy")
        yield server.url
    finally:
        server.command("SCRIPT", "KILL")
        script.join(LIMIT)


@contextmanager
def no_sentinels(server: Redis) -> Iterator[str]:
    ports = free_port(), free_port()
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    yield f"redis+sentinel://bobby:hush-1@{hosts}/name?sentinel_username=evelyn&sentinel_password=hush-2"


@contextmanager
def frozen_sentinel(server: Redis) -> Iterator[str]:
    with unreachable(server) as url:
        yield (
            url.replace("redis:", "redis+sentinel:")
            + "/name?sentinel_username=evelyn&sentinel_password=hush-2"
        )


#: Each fault, the kind that it is called, and a word of the reason that an operator would look for.
FAULTS: list[tuple[Callable[[Redis], Any], str, str]] = [
    (refused, "connection", "refused"),
    (no_socket, "connection", "none.sock"),
    (reset, "connection", "reset|closed"),
    (not_redis, "other", "HTTP"),
    (wrong_password, "auth", "invalid username-password pair"),
    (no_password, "auth", "[Aa]uthenticat"),
    (no_rights, "auth", "permissions"),
    (no_rights_in_the_script, "auth", "can't run this command"),
    (no_name, "name", "::1%dead"),
    (impossible_name, "name", "too long"),
    (frozen, "timeout", "Timeout"),
    (frozen_before_login, "timeout", "Timeout"),
    (unreachable, "timeout", "Timeout"),
    (silent_tls, "timeout", "[Tt]imed? ?out"),
    (no_answer, "timeout", "Timeout"),
    (read_only, "read_only", "read only replica"),
    (out_of_memory, "out_of_memory", "maxmemory"),
    (loading, "loading", "loading"),
    (too_few_replicas, "no_replicas", "NOREPLICAS"),
    (busy, "busy", "BUSY"),
    (full, "connection", "reset|not ready|max number of clients"),
    (no_sentinels, "no_primary", "refused"),
    (frozen_sentinel, "no_primary", "Timeout"),
]
every_fault = pytest.mark.parametrize(
    ("fault", "kind", "word"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS]
)


@every_fault
def test_a_fault_is_an_error_in_time_that_tells_its_kind_and_no_secret(
    server: Redis, fault: Callable[[Redis], Any], kind: str, word: str
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


@pytest.mark.parametrize(
    "fault",
    [read_only, out_of_memory, too_few_replicas, busy],
    ids=lambda fault: str(fault.__name__),
)
def test_after_any_error_the_connection_is_given_up_and_the_next_beat_makes_another(
    server: Redis, fault: Callable[[Redis], Any]
) -> None:
    with linked(server.url) as link:
        beat(link)
        (before,) = connections(server)
        with fault(server):
            failed(link)
        until(
            lambda: all(client["id"] != before["id"] for client in connections(server)),
            "it is closed",
        )
        assert beat(link, 7).total == 7


def test_when_redis_has_closed_the_connection_between_two_beats_nothing_is_lost(
    server: Redis,
) -> None:
    with linked(server.url) as link:
        beat(link)
        (before,) = connections(server)
        assert server.command("CLIENT", "KILL", "ID", before["id"]) == 1
        assert beat(link, 7).total == 7
        (after,) = connections(server)
        assert after["id"] != before["id"]


def test_a_late_answer_is_never_taken_for_that_of_the_next_beat(server: Redis) -> None:
    """The network holds an answer back for longer than the timeout, then lets everything through."""
    with Proxy(server.port) as proxy, linked(server.url_at(proxy.port)) as link:
        beat(link)
        for count in range(1, 4):
            proxy.delay_seconds = TIMEOUT_SECONDS
            assert kind_of(failed(link)) == "timeout"
            proxy.delay_seconds = 0.0
            until(lambda: server.command("EXISTS", *link.keys) == 3, "the first beat has arrived")
            assert beat(link, 100 + count).total == 100 + count


def test_a_beat_overtaken_while_redis_was_frozen_undoes_nothing(server: Redis) -> None:
    with linked(server.url) as link:
        beat(link, 5)
        with frozen(server):
            assert kind_of(failed(link)) == "timeout"
        assert beat(link, 7).total == 7
        assert beat(link, 8).total == 8
        assert server.members() == {"one": 8}


def test_the_timeout_is_no_more_than_a_tenth_of_the_ttl(server: Redis) -> None:
    with (
        frozen(server) as url,
        linked(url, member_ttl_seconds=1.0, heartbeat_interval_seconds=0.1) as link,
    ):
        began = time.monotonic()
        assert kind_of(failed(link)) == "timeout"
        assert time.monotonic() - began >= 0.09
    assert (
        link._options["socket_timeout"]
        == link._options["socket_connect_timeout"]
        == pytest.approx(0.1)
    )


def test_a_redis_that_cannot_save_is_told_from_other_errors(tmp_path: Path) -> None:
    with Redis(tmp_path) as server, linked(server.url) as link:
        server.command("CONFIG", "SET", "save", "3600 1")
        beat(link)
        shutil.rmtree(server.folder)
        server.command("BGSAVE")
        until(
            lambda: server.command("INFO", "persistence")["rdb_last_bgsave_status"] == "err",
            "it cannot save",
        )
        error = failed(link)
        assert kind_of(error) == "cannot_save"
        assert "MISCONF" in str(error)
        server.command("CONFIG", "SET", "stop-writes-on-bgsave-error", "no")
        assert beat(link, 7).total == 7


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
        (redis.BusyLoadingError("Redis is loading the dataset in memory"), "loading"),
        (BrokenPipeError(32, "Broken pipe"), "other"),
        (redis.ConnectionError("Error 32 while writing to socket. Broken pipe."), "connection"),
        (ValueError("not enough values"), "other"),
    ],
)
def test_errors_of_other_versions_of_redis_have_their_kinds_too(
    error: Exception, kind: str
) -> None:
    assert kind_of(error) == kind


def test_every_kind_is_met_here() -> None:
    assert {kind for _, kind, _ in FAULTS} | {"tls", "cannot_save"} == set(HEARTBEAT_ERRORS)


# Sentinels


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Redis, Server]]:
    """A Redis with a password, and one Sentinel with another."""
    with Redis(tmp_path, requirepass="hush-1") as server:
        rules = [f"monitor name 127.0.0.1 {server.port} 1", "auth-pass name hush-1"]
        lines = ["port PORT", *(f"sentinel {rule}" for rule in rules)]
        with Server("redis-sentinel", tmp_path, lines, "hush-2") as sentinel:
            yield server, sentinel


def sentinel_url(*ports: int, service: str = "name", password: str = "hush-2") -> str:
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"redis+sentinel://:hush-1@{hosts}/{service}?sentinel_password={password}"


def test_sentinels_say_where_redis_is_even_if_some_are_dead(watched: tuple[Redis, Server]) -> None:
    server, sentinel = watched
    for _ in range(4):  # in whatever order they are asked
        with linked(sentinel_url(free_port(), sentinel.port, free_port())) as link:
            assert beat(link, 5).total == 5
            assert server.members() == {"one": 5}


def test_sentinels_that_know_no_such_service_or_want_another_password_are_told_without_secrets(
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
        beat(link, 5)
        sentinel.command("SENTINEL", "REMOVE", "name")
        sentinel.command("SENTINEL", "MONITOR", "name", "127.0.0.1", another.port, 1)
        server.kill()
        failed(link)
        assert beat(link, 7).total == 7
        assert another.members() == {"one": 7}


def test_the_url_of_a_link_is_shown_without_secrets() -> None:
    with linked(sentinel_url(1, 2)) as link:
        assert (
            str(link)
            == str(RedisUrl.parse(sentinel_url(1, 2)))
            == "redis+sentinel://127.0.0.1:1,127.0.0.1:2/name"
        )


def test_a_server_follows_sentinels_that_were_all_set_up_anew(tmp_path: Path) -> None:
    """They count their failovers from 0 again, as one does that has missed the last of them."""
    with Sentinels(tmp_path) as sentinels:
        sentinels.failover()
        link = RedisLink(
            Config(redis_url=sentinels.url, member_ttl_seconds=2.0, heartbeat_interval_seconds=0.2)
        )

        def beats_at(redis: Redis) -> bool:
            link.call("one", f"{time.monotonic_ns():x}", 1, 1, 2000, 200, "", 0, 0)
            return redis.members() != {}

        before = sentinels.primary()
        assert beats_at(before)
        other = next(each for each in sentinels.redises if each is not before)
        for sentinel in sentinels.sentinels:
            sentinel.command("SENTINEL", "REMOVE", sentinels.name)
        other.command("REPLICAOF", "NO", "ONE")
        other.wipe()
        for sentinel in sentinels.sentinels:
            sentinel.command("SENTINEL", "MONITOR", sentinels.name, "127.0.0.1", other.port, 2)
        until(lambda: beats_at(other), "it goes where all of them say")
        link.drop()
