"""deploy/redis/redis.conf: two such Redis, with the user that it defines, carry a cluster."""

import hashlib
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from lab.admin import status
from lab.clusters import FAST, cluster, connect
from lab.redises import free_port
from lab.running import ROOT, until

CONFIG = (ROOT / "deploy/redis/redis.conf").read_text()
PASSWORD = "a-long-random-password"


@contextmanager
def deployed(folder: Path) -> Iterator[str]:
    """A Redis with the file, as its comments say; yield its URL."""
    port, digest = free_port(), hashlib.sha256(PASSWORD.encode()).hexdigest()
    lines = CONFIG.replace("0" * 64, digest).replace("port 6379", f"port {port}")
    file = folder / f"redis-{port}.conf"
    file.write_text(lines)
    command = ["redis-server", str(file), "--dir", str(folder)]
    with subprocess.Popen(command) as process, redis.Redis(port=port) as client:
        try:

            def answers() -> bool:
                try:
                    return bool(client.ping())
                except redis.AuthenticationError:
                    return True
                except redis.ConnectionError:
                    return False

            until(answers, "Redis answers")
            yield f"redis://gserver:{PASSWORD}@127.0.0.1:{port}"
        finally:
            process.terminate()
    assert [path.suffix for path in folder.iterdir()] == [".conf"], "it keeps nothing on disk"


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    with ExitStack() as stack:
        folders = [tmp_path_factory.mktemp("redis") for _ in range(2)]
        yield [stack.enter_context(deployed(folder)) for folder in folders]


def test_two_of_them_carry_a_cluster(urls: list[str]) -> None:
    options = [[*FAST, "--server-id", name, "--admin-port", "0"] for name in ("one", "two")]
    with cluster(" ".join(urls), "gserver", *options) as servers, ExitStack() as stack:
        clients = [client for server in servers for client in connect(stack, server, 2)]
        until(lambda: {client.who() for client in clients} == {4}, "all are counted")

        def listed() -> list[int]:
            return [each["servers"] for each in status(servers[0])["cluster"]["engines"]]

        until(lambda: listed() == [2, 2], "both Redis list both")
        document = status(servers[0])["cluster"]
        assert [one["id"] for one in document["members"]["servers"]] == ["one", "two"]
        assert PASSWORD not in str(document)
        assert not servers[0].events("cluster.lost")


def test_the_user_may_do_what_gserver_does_and_nothing_else(urls: list[str]) -> None:
    client: Any = redis.Redis.from_url(urls[0])
    for words in (["GET", "x"], ["FLUSHALL"], ["CONFIG", "GET", "*"], ["HGET", "other", "x"]):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*words)
    assert client.execute_command("HGET", "{gserver:gserver}:members", "x") is None
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis.from_url(re.sub("gserver:.*@", "", urls[0])).ping()


def test_nothing_is_evicted() -> None:
    assert "\nmaxmemory-policy noeviction\n" in CONFIG
