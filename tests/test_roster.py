"""The servers of a cluster, one by one: as a real Redis holds them, whatever it holds, and while it
is hung or away.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gserver.cluster.members import MAX_SERVERS, Roster
from gserver.cluster.redis_link import RedisLink
from gserver.config import Config
from gserver.redis_errors import HEARTBEAT_ERRORS
from tests.redises import Redis, Sentinels
from tests.running import PATIENCE, Running, until
from tests.test_admin import status
from tests.test_cluster import cluster

TTL_MS, INTERVAL_MS = 5000, 500
MEMBERS, LEASES, STATE = (f"{{gserver:gserver}}:{name}" for name in ("members", "leases", "state"))
RIGHTS = [
    "~{gserver:*}:*",
    "+eval",
    "+evalsha",
    "+@hash",
    "+@sortedset",
    "+time",
    "+del",
    "+expire",
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def server(shared: Redis) -> Redis:
    """The one of this file, empty."""
    shared.wipe()
    return shared


def told(url: str, **options: Any) -> dict[str, Any]:
    return Roster(Config(redis_url=url, server_id="here", **options)).told()


def beat(url: str, *servers: tuple[str, int], **options: Any) -> None:
    """Report as such servers do: each an id, and its clients."""
    link = RedisLink(Config(redis_url=url, **options))
    for server_id, clients in servers:
        link.call(
            server_id, "a1", time.monotonic_ns() // 1000, clients, TTL_MS, INTERVAL_MS, "", 0, 0
        )
    link.drop()


def silence(server: Redis, server_id: str, seconds: float) -> None:
    """Have a server's last report be that much older."""
    server.command("ZINCRBY", LEASES, round(-1000 * seconds), server_id)


def ids(roster: dict[str, Any]) -> list[str]:
    return [one["id"] for one in roster["servers"]]


def test_each_server_is_told_of_with_its_clients_and_its_last_report(server: Redis) -> None:
    beat(server.url, ("here", 5), ("<img/src=x>", 70_000))
    silence(server, "<img/src=x>", 3)
    roster = told(server.url)
    late, own = roster["servers"]
    assert 3 <= late.pop("silent_seconds") < 3 + PATIENCE
    assert late == {"id": "<img/src=x>", "clients": 70_000, "is_late": True, "is_this": False}
    assert 0 <= own.pop("silent_seconds") < PATIENCE
    assert own == {"id": "here", "clients": 5, "is_late": False, "is_this": True}
    assert 0 <= roster["age_seconds"] < PATIENCE
    assert (roster["left_out"], roster["trouble"]) == (0, None)


def test_a_report_grows_older_though_nobody_beats_but_no_older_than_an_interval(
    server: Redis,
) -> None:
    beat(server.url, ("here", 1))
    [one] = until(
        lambda: [one for one in told(server.url)["servers"] if one["silent_seconds"] > 0.2],
        "time goes by",
    )
    assert not one["is_late"]
    server.command(
        "HINCRBY", STATE, "beat_at", -3_600_000
    )  # The last beat was an hour ago: the lease clock stood still.
    roster = told(server.url)
    [one] = roster["servers"]
    assert one["silent_seconds"] - roster["age_seconds"] == pytest.approx(
        INTERVAL_MS / 1000, abs=1e-6
    )


def test_an_empty_cluster_is_known_to_be_empty(server: Redis) -> None:
    roster = told(server.url)
    assert (roster["servers"], roster["left_out"], roster["trouble"]) == ([], 0, None)
    assert roster["age_seconds"] >= 0


def test_who_is_late_comes_first_and_all_others_have_their_place(server: Redis) -> None:
    beat(server.url, *((name, 1) for name in ("d", "here", "a", "c", "b", "e")))
    silence(server, "c", 2)
    silence(server, "e", 3)
    silence(server, "d", 0.3)
    assert ids(told(server.url)) == ["e", "c", "a", "b", "d", "here"]


def test_of_many_those_silent_longest_are_listed_and_the_own(server: Redis) -> None:
    beat(server.url, *((f"server-{number:03}", number) for number in range(MAX_SERVERS + 50)))
    for number in range(20, MAX_SERVERS + 50):
        silence(server, f"server-{number:03}", 2)
    beat(server.url, ("here", 7))
    roster = told(server.url)
    assert (len(roster["servers"]), roster["left_out"]) == (MAX_SERVERS, 51)
    assert roster["servers"][-1]["id"] == "here"
    assert all(one["is_late"] for one in roster["servers"][:-1])


@pytest.mark.parametrize(
    "entry", [b"", b"x", b"5", b"-1 2 a", b"1e9 2 a", b"9" * 16 + b" 2 a", b"\xff\xfe", b"5 2 a b"]
)
def test_an_entry_that_is_none_is_a_server_with_an_unknown_count(
    server: Redis, entry: bytes
) -> None:
    beat(server.url, ("here", 5), ("odd", 6))
    server.command("HSET", MEMBERS, "odd", entry)
    roster = told(server.url)
    assert {one["id"]: one["clients"] for one in roster["servers"]} == {"here": 5, "odd": None}
    server.command("HDEL", MEMBERS, "odd")
    assert {one["id"]: one["clients"] for one in told(server.url)["servers"]} == {
        "here": 5,
        "odd": None,
    }


@pytest.mark.parametrize("lease", ["inf", "-inf", "1e300", "0.5", "-7"])
def test_a_lease_that_is_none_is_a_server_that_may_have_reported_whenever(
    server: Redis, lease: str
) -> None:
    beat(server.url, ("here", 5), ("odd", 6))
    server.command("ZADD", LEASES, lease, "odd")
    odd = next(one for one in told(server.url)["servers"] if one["id"] == "odd")
    assert odd == {
        "id": "odd",
        "clients": 6,
        "silent_seconds": None,
        "is_late": False,
        "is_this": False,
    }


@pytest.mark.parametrize("clock", ["", "x", "nan", "-5", "inf", None])
def test_a_clock_that_is_none_breaks_nothing(server: Redis, clock: str | None) -> None:
    beat(server.url, ("here", 5))
    server.command("HDEL", STATE, "clock") if clock is None else server.command(
        "HSET", STATE, "clock", clock
    )
    [own] = told(server.url)["servers"]
    assert own == {
        "id": "here",
        "clients": 5,
        "silent_seconds": None,
        "is_late": False,
        "is_this": True,
    }


@pytest.mark.parametrize(
    "name",
    [b"", b"\xff\xfe", b"two words", b"line\nfeed", b"x" * 129, b"x" * 1_000_000, "é".encode()],
)
def test_a_name_that_is_no_id_is_left_out_and_counted(server: Redis, name: bytes) -> None:
    beat(server.url, ("here", 5))
    server.command("ZADD", LEASES, 1, name)
    roster = told(server.url)
    assert (ids(roster), roster["left_out"]) == (["here"], 1)


@pytest.mark.parametrize("key", [MEMBERS, LEASES, STATE])
def test_a_key_that_is_somebody_elses_is_trouble_and_what_was_known_stands(
    server: Redis, key: str
) -> None:
    beat(server.url, ("here", 5))
    roster = Roster(Config(redis_url=server.url, server_id="here"))
    assert ids(roster.told()) == ["here"]
    server.command("SET", key, "a poem")
    until(lambda: roster.told()["trouble"], "it has been read once more")
    known = roster.told()
    assert (ids(known), known["trouble"]) == (["here"], "other")
    assert told(server.url) == {
        "servers": None,
        "left_out": 0,
        "age_seconds": None,
        "trouble": "other",
    }


# Where Redis is, and what it may refuse


def test_a_user_with_the_documented_rights_may_read_it(server: Redis) -> None:
    server.command("ACL", "SETUSER", "bobby", "reset", "on", ">hush", *RIGHTS)
    url = f"redis://bobby:hush@127.0.0.1:{server.port}"
    beat(url, ("here", 5))
    assert ids(told(url)) == ["here"]
    server.command("ACL", "SETUSER", "bobby", "resetpass")
    assert told(url)["trouble"] == "auth"
    server.command("ACL", "DELUSER", "bobby")


def test_it_is_read_by_a_socket_and_from_the_database_and_the_cluster_of_the_config(
    server: Redis,
) -> None:
    beat(server.url, ("elsewhere", 5))
    for url in (f"{server.unix_url}?db=3", f"{server.url}/3"):
        beat(url, ("here", 5), cluster_name="east")
        assert ids(told(url, cluster_name="east")) == ["here"]
        assert ids(told(url)) == []


def test_it_is_read_by_tls(tmp_path: Path) -> None:
    with Redis(tmp_path, is_tls=True) as encrypted:
        beat(encrypted.url, ("here", 5), redis_ca_file=str(encrypted.ca_file))
        assert ids(told(encrypted.url, redis_ca_file=str(encrypted.ca_file))) == ["here"]
        assert told(encrypted.url, redis_ca_file=str(encrypted.other_ca_file))["trouble"] == "tls"


def test_it_is_read_where_the_sentinels_say(tmp_path: Path) -> None:
    with Sentinels(tmp_path, password="hush", sentinel_password="hush-2") as sentinels:
        beat(sentinels.url, ("here", 5))
        assert ids(told(sentinels.url)) == ["here"]


def test_a_redis_that_takes_no_writes_still_tells(server: Redis) -> None:
    beat(server.url, ("here", 5))
    server.read_only()
    assert ids(told(server.url)) == ["here"]
    server.writable()
    server.out_of_memory()
    assert ids(told(server.url)) == ["here"]
    server.enough_memory()


def test_it_is_read_once_a_second_at_most_and_leaves_no_connection(server: Redis) -> None:
    beat(server.url, ("here", 5))
    server.command("CONFIG", "RESETSTAT")
    began, roster = time.monotonic(), Roster(Config(redis_url=server.url, server_id="here"))
    asked = 0
    while time.monotonic() < began + 0.5:
        asked += ids(roster.told()) == ["here"]
    read = server.command("INFO", "commandstats")["cmdstat_evalsha"]["calls"]
    assert asked > 100
    assert read <= 1 + (time.monotonic() - began)
    until(
        lambda: len(server.command("CLIENT LIST")) == 1, "only who asks for the list is connected"
    )


# In a server


def roster_of(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = status(server)["cluster"]["roster"]
    return found


def test_the_list_follows_servers_that_come_go_and_die(server: Redis) -> None:
    quick = ["--member-ttl", "3"]
    options = ["--redis-url", server.url, *quick]
    with cluster(server.url, "gserver", [*quick, "--server-id", "a", "--admin-port", "0"]) as [
        first
    ]:
        until(lambda: ids(roster_of(first)) == ["a"], "it is alone")
        with Running(*options, "--server-id", "b") as second, second.client() as client:
            assert client.ask(b"WHERE") == b"b"
            until(
                lambda: [one["clients"] for one in roster_of(first)["servers"]] == [0, 1],
                "the other is there",
            )
            second.stop()
            until(lambda: ids(roster_of(first)) == ["a"], "the other has gone")
        with Running(*options, "--server-id", "0") as third:
            until(lambda: ids(roster_of(first)) == ["0", "a"], "another one is there")
            third.kill()
            until(
                lambda: [one["is_late"] for one in roster_of(first)["servers"]] == [True, False],
                "it is late",
            )
            until(lambda: ids(roster_of(first)) == ["a"], "it is taken for dead")


@contextmanager
def gone(server: Redis, is_hung: bool) -> Iterator[None]:
    """Redis hung, or away."""
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
def test_while_redis_is_hung_or_away_the_last_known_are_told_at_once_with_their_age(
    server: Redis, is_hung: bool
) -> None:
    with cluster(server.url, "gserver", ["--server-id", "a", "--admin-port", "0"]) as [first]:
        until(lambda: ids(roster_of(first)) == ["a"], "it is known")
        with gone(server, is_hung):
            roster, ages, took = roster_of(first), [], []
            silences = [roster["servers"][0]["silent_seconds"] - roster["age_seconds"]]
            while roster["age_seconds"] < 1.2 or roster["trouble"] is None:
                began = time.monotonic()
                roster = roster_of(first)
                took.append(time.monotonic() - began)
                ages.append(roster["age_seconds"])
                silences.append(roster["servers"][0]["silent_seconds"] - roster["age_seconds"])
                assert ids(roster) == ["a"]
            assert max(took) < 0.25 + 0.2 * PATIENCE
            assert ages == sorted(ages), "it grows older"
            assert min(silences) >= 0, "and so does the last report"
            assert max(silences) - min(silences) < 0.01
            assert roster["trouble"] == ("timeout" if is_hung else "connection")
        until(
            lambda: roster_of(first)["age_seconds"] < 1 and roster_of(first)["trouble"] is None,
            "it is read again",
        )
        assert not first.events("process.error")


def test_a_server_that_has_never_reached_redis_does_not_know_the_others(server: Redis) -> None:
    with (
        gone(server, is_hung=False),
        Running("--redis-url", server.url, "--admin-port", "0") as first,
    ):
        first.wait_for("agent.ready")
        roster = until(lambda: roster_of(first)["trouble"] and roster_of(first), "it was tried")
        assert roster == {
            "servers": None,
            "left_out": 0,
            "age_seconds": None,
            "trouble": "connection",
        }
        assert roster["trouble"] in HEARTBEAT_ERRORS
