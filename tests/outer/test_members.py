"""The list of a cluster's servers, read from a real Redis.

The Redis holds valid or invalid values, hangs, or is unavailable.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gserver.cluster.members import MAX_SERVERS, Members
from gserver.cluster.membership import Heartbeat
from gserver.cluster.redis_link import RedisLink
from gserver.config import Config
from gserver.redis_errors import HEARTBEAT_ERRORS
from lab.admin import status
from lab.clusters import cluster
from lab.redises import Redis, Sentinels, keys_of
from lab.running import LIMIT, PATIENCE, Running, argv, until

TTL_MS, INTERVAL_MS = 5000, 500
MEMBERS, LEASES, STATE = keys_of()
RIGHTS = ["~{gserver:*}:*", *argv("+eval +evalsha +@hash +@sortedset +time +del +expire")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def server(shared: Redis) -> Redis:
    """The Redis of this file, empty."""
    shared.wipe()
    return shared


def payload(url: str, **options: Any) -> dict[str, Any]:
    return Members(Config(redis_url=url, server_id="here", **options)).payload()


def listed(server: Redis) -> list[dict[str, Any]]:
    return list(payload(server.url)["servers"])


def report(url: str, *servers: tuple[str, int], admin_url: str = "", **options: Any) -> None:
    """Send the heartbeats of servers, each given by its id and its number of clients."""
    link = RedisLink(Config(redis_url=url, **options))
    for server_id, clients in servers:
        sequence = time.monotonic_ns() // 1000
        heartbeat = Heartbeat(server_id, "a1", sequence, clients, TTL_MS, INTERVAL_MS)
        # It knows the clock: its first heartbeat needs no repetition.
        link.send(heartbeat._replace(admin_url=admin_url, told_clock=10**14))
    link.drop()


def age_report(server: Redis, server_id: str, seconds: float) -> None:
    """Make the last heartbeat of a server this much older."""
    server.command("ZINCRBY", LEASES, round(-1000 * seconds), server_id)


def ids(members: dict[str, Any]) -> list[str]:
    return [one["id"] for one in members["servers"]]


def test_each_server_is_listed_with_its_clients_and_its_last_report(server: Redis) -> None:
    report(server.url, ("here", 5), ("<img/src=x>", 70_000))
    age_report(server, "<img/src=x>", 3)
    members = payload(server.url)
    late, own = members["servers"]
    assert 3 <= late.pop("silent_seconds") < 3 + PATIENCE
    assert late == {
        "id": "<img/src=x>",
        "clients": 70_000,
        "is_late": True,
        "is_this": False,
        "admin_url": None,
    }
    assert 0 <= own.pop("silent_seconds") < PATIENCE
    assert own == late | {"id": "here", "clients": 5, "is_late": False, "is_this": True}
    assert 0 <= members["age_seconds"] < PATIENCE
    assert (members["omitted_servers"], members["error_kind"]) == (0, None)


def test_without_heartbeats_a_report_ages_by_one_interval_at_most(server: Redis) -> None:
    report(server.url, ("here", 1))
    [one] = until(
        lambda: [one for one in payload(server.url)["servers"] if one["silent_seconds"] > 0.2],
        "time passes",
    )
    assert not one["is_late"]
    server.command(
        "HINCRBY", STATE, "heartbeat_at", -3_600_000
    )  # The last heartbeat was an hour ago, so the lease clock has stopped.
    members = payload(server.url)
    [one] = members["servers"]
    assert one["silent_seconds"] - members["age_seconds"] == pytest.approx(
        INTERVAL_MS / 1000, abs=1e-6
    )


def test_an_empty_cluster_is_known_to_be_empty(server: Redis) -> None:
    members = payload(server.url)
    assert (members["servers"], members["omitted_servers"], members["error_kind"]) == ([], 0, None)
    assert 0 <= members["age_seconds"] < LIMIT


def test_late_servers_come_first_and_all_others_are_sorted_by_id(server: Redis) -> None:
    report(server.url, *((name, 1) for name in ("d", "here", "a", "c", "b", "e")))
    age_report(server, "c", 2)
    age_report(server, "e", 3)
    age_report(server, "d", 0.3)
    assert ids(payload(server.url)) == ["e", "c", "a", "b", "d", "here"]


def test_a_long_list_keeps_the_own_server_and_the_longest_silent_ones(server: Redis) -> None:
    report(server.url, *((f"server-{number:03}", number) for number in range(MAX_SERVERS + 50)))
    for number in range(20, MAX_SERVERS + 50):
        age_report(server, f"server-{number:03}", 2)
    report(server.url, ("here", 7))
    members = payload(server.url)
    assert (len(members["servers"]), members["omitted_servers"]) == (MAX_SERVERS, 51)
    assert members["servers"][-1]["id"] == "here"
    assert all(one["is_late"] for one in members["servers"][:-1])


@pytest.mark.parametrize(
    "entry",
    [b"", b"x", b"5", b"-1 2 a", b"1e9 2 a", b"9" * 16 + b" 2 a", b"\xff\xfe", b"5 2 a b c"],
)
def test_a_server_with_an_invalid_entry_has_an_unknown_count(server: Redis, entry: bytes) -> None:
    report(server.url, ("here", 5), ("odd", 6))
    server.command("HSET", MEMBERS, "odd", entry)
    members = payload(server.url)
    assert {one["id"]: one["clients"] for one in members["servers"]} == {"here": 5, "odd": None}
    server.command("HDEL", MEMBERS, "odd")
    assert {one["id"]: one["clients"] for one in payload(server.url)["servers"]} == {
        "here": 5,
        "odd": None,
    }


@pytest.mark.parametrize("lease", ["inf", "-inf", "1e300", "0.5", "-7"])
def test_a_server_with_an_invalid_lease_has_an_unknown_silence(server: Redis, lease: str) -> None:
    report(server.url, ("here", 5), ("odd", 6))
    server.command("ZADD", LEASES, lease, "odd")
    odd = next(one for one in payload(server.url)["servers"] if one["id"] == "odd")
    assert odd == {
        "id": "odd",
        "clients": 6,
        "silent_seconds": None,
        "is_late": False,
        "is_this": False,
        "admin_url": None,
    }


@pytest.mark.parametrize("url", [f"http://127.0.0.1:4243/{'x' * 105}", "https://[::1]/a?b=c"])
def test_a_server_is_listed_with_the_url_of_its_page(server: Redis, url: str) -> None:
    report(server.url, ("here", 5), ("there", 10**14), admin_url=url)
    assert {one["id"]: (one["clients"], one["admin_url"]) for one in listed(server)} == {
        "here": (5, url),
        "there": (10**14, url),
    }
    report(server.url, ("here", 6))
    assert {one["id"]: (one["clients"], one["admin_url"]) for one in listed(server)} == {
        "here": (6, None),
        "there": (10**14, url),
    }


@pytest.mark.parametrize("url", ["javascript:alert(1)", "http://a:b@h", "http://\xff", "x" * 200])
def test_what_is_no_url_of_http_is_not_listed_as_one(server: Redis, url: str) -> None:
    report(server.url, ("here", 5))
    entry = server.command("HGET", MEMBERS, "here")
    server.command("HSET", MEMBERS, "here", f"{entry} {url}".encode("latin-1"))
    assert listed(server)[0]["admin_url"] is None


@pytest.mark.parametrize("clock", ["", "x", "nan", "-5", "inf", None])
def test_an_invalid_clock_breaks_nothing(server: Redis, clock: str | None) -> None:
    report(server.url, ("here", 5))
    server.command("HDEL", STATE, "clock") if clock is None else server.command(
        "HSET", STATE, "clock", clock
    )
    [own] = payload(server.url)["servers"]
    assert own == {
        "id": "here",
        "clients": 5,
        "silent_seconds": None,
        "is_late": False,
        "is_this": True,
        "admin_url": None,
    }


@pytest.mark.parametrize(
    "name",
    [b"", b"\xff\xfe", b"two words", b"line\nfeed", b"x" * 129, b"x" * 1_000_000, "é".encode()],
)
def test_an_invalid_id_is_not_listed_but_counted(server: Redis, name: bytes) -> None:
    report(server.url, ("here", 5))
    server.command("ZADD", LEASES, 1, name)
    members = payload(server.url)
    assert (ids(members), members["omitted_servers"]) == (["here"], 1)


@pytest.mark.parametrize("key", [MEMBERS, LEASES, STATE])
def test_a_key_of_another_program_is_an_error_and_keeps_the_last_list(
    server: Redis, key: str
) -> None:
    report(server.url, ("here", 5))
    members = Members(Config(redis_url=server.url, server_id="here"))
    assert ids(members.payload()) == ["here"]
    server.command("SET", key, "a poem")
    until(lambda: members.payload()["error_kind"], "the list has been read again")
    known = members.payload()
    assert (ids(known), known["error_kind"]) == (["here"], "other")
    expected = {"servers": None, "omitted_servers": 0, "age_seconds": None, "error_kind": "other"}
    assert payload(server.url) == expected


# Addresses, logins and permissions


def test_a_user_with_the_documented_rights_may_read_the_list(server: Redis) -> None:
    server.command("ACL", "SETUSER", "bobby", "reset", "on", ">hush", *RIGHTS)
    url = f"redis://bobby:hush@127.0.0.1:{server.port}"
    report(url, ("here", 5))
    assert ids(payload(url)) == ["here"]
    server.command("ACL", "SETUSER", "bobby", "resetpass")
    assert payload(url)["error_kind"] == "auth"
    server.command("ACL", "DELUSER", "bobby")


def test_the_list_is_read_from_the_socket_the_database_and_the_cluster_of_the_config(
    server: Redis,
) -> None:
    report(server.url, ("elsewhere", 5))
    for url in (f"{server.unix_url}?db=3", f"{server.url}/3"):
        report(url, ("here", 5), cluster_name="east")
        assert ids(payload(url, cluster_name="east")) == ["here"]
        assert ids(payload(url)) == []


def test_the_list_is_read_over_tls(tmp_path: Path) -> None:
    with Redis(tmp_path, is_tls=True) as encrypted:
        report(encrypted.url, ("here", 5), redis_ca_file=str(encrypted.ca_file))
        assert ids(payload(encrypted.url, redis_ca_file=str(encrypted.ca_file))) == ["here"]
        assert (
            payload(encrypted.url, redis_ca_file=str(encrypted.other_ca_file))["error_kind"]
            == "tls"
        )


def test_the_list_is_read_from_the_primary_of_the_sentinels(tmp_path: Path) -> None:
    with Sentinels(tmp_path, password="hush", sentinel_password="hush-2") as sentinels:
        report(sentinels.url, ("here", 5))
        assert ids(payload(sentinels.url)) == ["here"]


def test_the_list_is_read_from_a_redis_that_accepts_no_writes(server: Redis) -> None:
    report(server.url, ("here", 5))
    server.read_only()
    assert ids(payload(server.url)) == ["here"]
    server.writable()
    server.out_of_memory()
    assert ids(payload(server.url)) == ["here"]
    server.enough_memory()


def test_redis_is_read_once_a_second_at_most_and_no_connection_stays(server: Redis) -> None:
    report(server.url, ("here", 5))
    server.command("CONFIG", "RESETSTAT")
    began, members = time.monotonic(), Members(Config(redis_url=server.url, server_id="here"))
    asked = 0
    while time.monotonic() < began + 0.5:
        asked += ids(members.payload()) == ["here"]
    read = server.command("INFO", "commandstats")["cmdstat_evalsha"]["calls"]
    assert asked > 100
    assert read <= 1 + (time.monotonic() - began)
    until(
        lambda: len(server.command("CLIENT LIST")) == 1, "only this test's own connection is left"
    )


# In a server


def members_of(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = status(server)["cluster"]["members"]
    return found


def test_the_list_follows_servers_that_start_stop_and_die(server: Redis) -> None:
    quick = ["--member-ttl", "3"]
    options = ["--redis-url", server.url, *quick]
    with cluster(server.url, "gserver", [*quick, "--server-id", "a", "--admin-port", "0"]) as [
        first
    ]:
        until(lambda: ids(members_of(first)) == ["a"], "the first server is the only one")
        with Running(*options, "--server-id", "b") as second, second.client() as client:
            assert client.ask(b"WHERE") == b"b"
            until(
                lambda: [one["clients"] for one in members_of(first)["servers"]] == [0, 1],
                "the second server is listed",
            )
            second.stop()
            until(lambda: ids(members_of(first)) == ["a"], "the second server is not listed")
        with Running(*options, "--server-id", "0") as third:
            until(lambda: ids(members_of(first)) == ["0", "a"], "the third server is listed")
            third.kill()
            until(
                lambda: [one["is_late"] for one in members_of(first)["servers"]] == [True, False],
                "the third server is late",
            )
            until(lambda: ids(members_of(first)) == ["a"], "the third server has expired")


@contextmanager
def unavailable(server: Redis, is_hung: bool) -> Iterator[None]:
    """Make Redis hang or unavailable."""
    if is_hung:
        server.freeze()
    else:
        server.kill()
    try:
        yield
    finally:
        if is_hung:
            server.thaw()
        else:
            server.start()


@pytest.mark.parametrize("is_hung", [True, False])
def test_without_redis_the_last_known_list_is_returned_at_once_with_its_age(
    server: Redis, is_hung: bool
) -> None:
    with cluster(server.url, "gserver", ["--server-id", "a", "--admin-port", "0"]) as [first]:
        until(lambda: ids(members_of(first)) == ["a"], "the server is listed")
        with unavailable(server, is_hung):
            members, ages, took = members_of(first), [], []
            silences = [members["servers"][0]["silent_seconds"] - members["age_seconds"]]
            while members["age_seconds"] < 1.2 or members["error_kind"] is None:
                began = time.monotonic()
                members = members_of(first)
                took.append(time.monotonic() - began)
                ages.append(members["age_seconds"])
                silences.append(members["servers"][0]["silent_seconds"] - members["age_seconds"])
                assert ids(members) == ["a"]
            assert max(took) < 0.25 + 0.2 * PATIENCE
            assert ages == sorted(ages), "the list ages"
            assert min(silences) >= 0, "the last report ages too"
            assert max(silences) - min(silences) < 0.01
            assert members["error_kind"] == ("timeout" if is_hung else "connection")
        until(
            lambda: (
                members_of(first)["age_seconds"] < 1 and members_of(first)["error_kind"] is None
            ),
            "the list is read again",
        )
        assert not first.events("process.error")


def test_a_server_that_has_never_reached_redis_has_no_list(server: Redis) -> None:
    with (
        unavailable(server, is_hung=False),
        Running("--redis-url", server.url, "--admin-port", "0") as first,
    ):
        first.wait_for("agent.ready")
        members = until(
            lambda: members_of(first)["error_kind"] and members_of(first), "the list was requested"
        )
        assert members == {
            "servers": None,
            "omitted_servers": 0,
            "age_seconds": None,
            "error_kind": "connection",
        }
        assert members["error_kind"] in HEARTBEAT_ERRORS
