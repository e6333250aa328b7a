"""A connection to Redis, such as the one over which this server beats, and what its errors are
called.

Any error drops the connection, so that no late answer can be taken for the next one's (redis-py
issue 4292), and so that a primary that was demoted is not asked again: the next call connects anew,
and asks the Sentinels first.
"""

import hashlib
import random
import re
import socket
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar, cast
from urllib.parse import quote

import redis
from redis._parsers import _RESP2Parser
from redis.backoff import NoBackoff
from redis.retry import Retry

from gserver.cluster.membership import Reply
from gserver.config import Config
from gserver.redis_errors import HEARTBEAT_ERRORS
from gserver.redis_url import RedisUrl

#: For a connect and for each answer, of Redis and of a Sentinel; a tenth of the TTL if that is
#: less.
TIMEOUT_SECONDS = 0.5
MAX_PARTS = 10_000
SCRIPT = Path(__file__).with_name("heartbeat.lua").read_text()

Answer = TypeVar("Answer")


@cache
def sha_of(script: str) -> str:
    """Return the name by which Redis knows a script that it has run before."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def kind_of(error: BaseException) -> str:
    """Return which of HEARTBEAT_ERRORS an error is."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 10:
        texts.append(f"{type(cause).__name__} {cause}")
        cause = cause.__cause__ or cause.__context__
    return next(
        kind for kind, pattern in HEARTBEAT_ERRORS.items() if re.search(pattern, "\n".join(texts))
    )


def _read(answer: Any) -> Reply:
    """Return the script's answer; raise ValueError if it cannot be one."""
    reply = Reply(*answer)
    numbers = [value for name, value in reply._asdict().items() if name != "holder"]
    if not all(isinstance(number, int) and 0 <= number < 2**53 for number in numbers):
        raise ValueError("the answer is not of the script's form")
    return reply._replace(holder=answer[5].decode())


class _Parser(_RESP2Parser):
    """Gives up an answer of more parts than ours have: while it takes them apart, nothing else in the agent runs."""

    def read_response(self, *arguments: Any, **more: Any) -> Any:
        self._parts = 0
        return super().read_response(*arguments, **more)

    def _read_response(self, *arguments: Any, **more: Any) -> Any:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise redis.InvalidResponse("an answer of too many parts")
        return super()._read_response(*arguments, **more)


class NoPrimary(redis.ConnectionError):
    """None of the Sentinels names a primary."""


class RedisLink:
    """At most one connection, made when it is needed."""

    def __init__(self, config: Config) -> None:
        self._url = url = RedisUrl.parse(config.redis_url)
        self._sentinels = deque(random.sample(url.hosts, len(url.hosts)))
        self._primary = ("", 0)
        #: The last failover that a Sentinel has told of, and how many in a row had not heard of it.
        self._epoch = self._behind = 0
        self._check_at = 0.0
        # Within a TTL all servers have found the new primary, so nobody's lease is over there.
        self._check_seconds = config.member_ttl_seconds / 4
        # One hash tag: all keys are in one slot of a Redis Cluster.
        self.keys = [
            f"{{gserver:{config.cluster_name}}}:{name}" for name in ("members", "leases", "state")
        ]
        self._client: redis.Redis | None = None
        # Left alone, redis-py tries ten times for five seconds each. Here the next beat is the next
        # try.
        timeout = min(TIMEOUT_SECONDS, config.member_ttl_seconds / 10)
        self._options: dict[str, Any] = {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            # What is given up must not be sent again by the kernel, for minutes, and bring back who
            # is gone by then.
            "socket_keepalive": True,
            "socket_keepalive_options": {socket.TCP_USER_TIMEOUT: round(timeout * 1000)},
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "driver_info": None,
        }
        if url.has_tls:
            is_verified = config.redis_tls_verify == "yes"
            self._options |= {
                "ssl": True,
                "ssl_cert_reqs": "required" if is_verified else "none",
                "ssl_check_hostname": is_verified,
                "ssl_ca_certs": config.redis_ca_file or None,
            }

    def __str__(self) -> str:
        """Where it leads to, without secrets."""
        return str(self._url)

    def call(self, *arguments: str | int) -> Reply:
        """Beat: run heartbeat.lua."""
        return self.run(SCRIPT, _read, *arguments)

    def run(self, script: str, read: Callable[[Any], Answer], *arguments: str | int) -> Answer:
        """Return what `read` makes of a script's answer; raise what it, redis-py or the system
        raises.

        After any error the connection is dropped.
        """
        try:
            if self._client is None or self._has_moved():
                self.drop()
                self._client = self._connect()
            try:
                answer = self._client.evalsha(
                    sha_of(script), len(self.keys), *self.keys, *arguments
                )
            except redis.exceptions.NoScriptError:
                answer = self._client.eval(script, len(self.keys), *self.keys, *arguments)
            return read(answer)
        except BaseException:
            self.drop()
            # What a Sentinel has named may be what is wrong: another one is asked next.
            self._sentinels.rotate(-1)
            raise

    def explain(self, error: BaseException) -> str:
        """Return the error's text, without the secrets that a Redis may have repeated in it."""
        text = str(error)
        for secret in (self._url.password, self._url.sentinel_password):
            for form in (secret, quote(secret, safe="")) if secret else ():
                text = text.replace(form, "***")
        return text

    def drop(self) -> None:
        """Close the connection, if there is one."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connect(self) -> redis.Redis:
        url = self._url
        login: dict[str, Any] = {
            "username": url.username or None,
            "password": url.password or None,
            "db": url.db,
        }
        if url.path:
            return self._client_of(unix_socket_path=url.path, **login)
        host, port = self._find_primary() if url.service else url.hosts[0]
        return self._client_of(host=host, port=port, **login)

    def _client_of(self, **place_and_login: Any) -> redis.Redis:
        client = redis.Redis(**place_and_login, **self._options)
        client.connection_pool.connection_kwargs["parser_class"] = _Parser
        return client

    def _find_primary(self) -> tuple[str, int]:
        """Ask the Sentinels in turn; who does not know comes last the next time."""
        reasons = []
        for host, port in list(self._sentinels):
            try:
                return self._ask_sentinel(host, port)
            except Exception as error:
                reasons.append(f"{host}:{port}: {error}")
                self._sentinels.rotate(-1)
        # Those that can be asked may have been set up anew: the next try takes what they say.
        self._epoch = 0
        raise NoPrimary("no Sentinel names a primary: " + "; ".join(reasons))

    def _ask_sentinel(self, host: str, port: int) -> tuple[str, int]:
        """Return what a Sentinel names. One that is cut off from the others goes on to name the one before."""
        url = self._url
        self._check_at = monotonic() + self._check_seconds
        behind, self._behind = self._behind + 1, 0
        login: dict[str, Any] = {
            "username": url.sentinel_username or None,
            "password": url.sentinel_password or None,
        }
        with self._client_of(host=host, port=port, **login) as sentinel:
            epoch = self._epoch_of(sentinel)
            primary = cast(Any, sentinel.sentinel_get_master_addr_by_name(url.service))
        if not primary:
            raise NoPrimary(f"knows no {url.service}")
        if epoch < self._epoch and behind < len(
            self._sentinels
        ):  # All in a row: they have been set up anew.
            self._behind = behind
            raise NoPrimary("has not heard of the last failover")
        self._epoch, self._primary = epoch, (primary[0].decode(), int(primary[1]))
        return self._primary

    def _epoch_of(self, sentinel: redis.Redis) -> int:
        """Return the number of the failover that a Sentinel knows of; the last known one where it may not say."""
        try:
            return int(cast(Any, sentinel.sentinel_master(self._url.service))["config-epoch"])
        except (redis.ResponseError, KeyError, ValueError):
            return self._epoch

    def _has_moved(self) -> bool:
        """Whether the primary is another one by now: a demoted one goes on taking beats for some
        ten seconds.

        Another Sentinel is asked each time, for the one that named it may be cut off from the
        others.
        """
        if not self._url.service or monotonic() < self._check_at:
            return False
        known = self._primary
        self._sentinels.rotate(-1)
        try:
            return self._ask_sentinel(*self._sentinels[0]) != known
        except Exception:
            return False
