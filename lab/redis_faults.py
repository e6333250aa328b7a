"""Faults of a Redis: each is in effect when the body begins, and ends with it."""

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest
import redis

from lab.redises import Redis
from lab.running import LIMIT, until

RedisFault = Callable[[Redis], AbstractContextManager[None]]


def switched(
    name: str, begin: Callable[[Redis], object], end: Callable[[Redis], object]
) -> RedisFault:
    """A fault that one call starts and another ends."""

    @contextmanager
    def fault(server: Redis) -> Iterator[None]:
        begin(server)
        try:
            yield
        finally:
            end(server)

    fault.__name__ = name
    return fault


def _replicas_wanted(count: int) -> Callable[[Redis], object]:
    return lambda server: server.command("CONFIG", "SET", "min-replicas-to-write", count)


frozen = switched("frozen", Redis.freeze, Redis.thaw)
read_only = switched("read_only", Redis.read_only, Redis.writable)
out_of_memory = switched("out_of_memory", Redis.out_of_memory, Redis.enough_memory)
too_few_replicas = switched("too_few_replicas", _replicas_wanted(5), _replicas_wanted(0))


@contextmanager
def paused(server: Redis) -> Iterator[None]:
    """Redis does nothing for a second."""
    server.command("CLIENT", "PAUSE", 1000, "ALL")
    yield
    server.command("PING")


@contextmanager
def busy(server: Redis) -> Iterator[None]:
    """Redis runs an endless script of another program."""

    def run() -> None:
        with pytest.raises(redis.ResponseError, match=r"[Ss]cript killed"):
            server.command("EVAL", "while true do end", 0)

    server.command("CONFIG", "SET", "busy-reply-threshold", 10)
    script = threading.Thread(target=run)
    script.start()
    try:
        until(lambda: replies_with(server, "BUSY"), "Redis is busy")
        yield
    finally:
        server.command("SCRIPT", "KILL")
        script.join(LIMIT)


@contextmanager
def loading(server: Redis) -> Iterator[None]:
    """Redis has just started, and loads much data slowly."""
    server.command("EVAL", "for i = 1, 20000 do redis.call('SET', 'key' .. i, i) end", 0)
    server.command(
        "CONFIG", "SET", "key-load-delay", 100, "loading-process-events-interval-bytes", 1024
    )
    server.command("CONFIG", "REWRITE")
    server.command("SAVE")
    server.kill()
    start = threading.Thread(target=server.restart, args=[True])
    start.start()
    try:
        until(lambda: replies_with(server, "loading"), "Redis is loading")
        yield
    finally:
        start.join(LIMIT)


@contextmanager
def full(server: Redis) -> Iterator[None]:
    """Redis has reached its limit of clients."""
    _, limit = server.command("CONFIG", "GET", "maxclients")
    with redis.Redis(port=server.port) as admin, ExitStack() as crowd:
        for _ in range(5):
            crowd.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        admin.config_set("maxclients", 1)
        try:
            yield
        finally:
            admin.config_set("maxclients", limit)


@contextmanager
def cannot_save(server: Redis) -> Iterator[None]:
    """Redis could not save its data, and rejects writes."""
    server.command("CONFIG", "SET", "save", "3600 1")
    shutil.rmtree(server.folder)
    server.command("BGSAVE")
    until(
        lambda: server.command("INFO", "persistence")["rdb_last_bgsave_status"] == "err",
        "Redis cannot save",
    )
    yield
    server.folder.mkdir()
    server.command("CONFIG", "SET", "save", "")


def replies_with(server: Redis, word: str) -> bool:
    """Whether Redis replies with an error that contains this word."""
    try:
        server.command("PING")
    except redis.RedisError as error:
        return word in str(error)
    return False
