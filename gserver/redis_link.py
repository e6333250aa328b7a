"""The one connection to Redis over which this server beats, and what its errors are called.

Any error drops the connection, so that no late answer can be taken for the next one's (redis-py issue 4292), and so
that a primary that was demoted is not asked again: the next call connects anew, and asks the Sentinels first.
"""

import hashlib
import re
from pathlib import Path
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from gserver.config import Config
from gserver.membership import Reply
from gserver.redis_url import RedisUrl

#: For a connect and for each answer, of Redis and of a Sentinel; a tenth of the TTL if that is less.
TIMEOUT_SECONDS = 0.5
SCRIPT = Path(__file__).with_name("cluster.lua").read_text()
SCRIPT_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()

#: Kinds of BEAT_ERRORS: the first whose pattern is in the error or its causes. Redis' own codes are looked for in the
#: text, since redis-py has classes for some only, and Redis 6 wraps those of a script.
_KINDS = {
    "name": "gaierror|UnicodeError",
    "tls": "SSL",
    "auth": "Authentication|NOAUTH|WRONGPASS|NOPERM|NoPermission",
    "no_primary": "MasterNotFound",
    "timeout": "Timeout|timed out",
    "read_only": "READONLY|ReadOnly",
    "out_of_memory": "OOM|OutOfMemory",
    "loading": "LOADING|BusyLoading",
    "connection": "Connection|OSError",
}


def kind_of(error: BaseException) -> str:
    """Return which of BEAT_ERRORS an error is."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 10:
        texts.append(f"{type(cause).__name__} {cause}")
        cause = cause.__cause__ or cause.__context__
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, "\n".join(texts))), "other")


class RedisLink:
    """At most one connection, made when it is needed."""

    def __init__(self, config: Config) -> None:
        self._url = url = RedisUrl.parse(config.redis_url)
        # One hash tag: all keys are in one slot of a Redis Cluster.
        self.keys = [f"{{gserver:{config.cluster_name}}}:{name}" for name in ("members", "leases", "state")]
        self._client: redis.Redis | None = None
        # Left alone, redis-py tries ten times for five seconds each. Here the next beat is the next try.
        timeout = min(TIMEOUT_SECONDS, config.member_ttl_seconds / 10)
        self._options: dict[str, Any] = {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
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
        """Run the script; raise what redis-py or the system raises, with the connection dropped."""
        try:
            if self._client is None:
                self._client = self._connect()
            try:
                answer = self._client.evalsha(SCRIPT_SHA, len(self.keys), *self.keys, *arguments)
            except redis.exceptions.NoScriptError:
                answer = self._client.eval(SCRIPT, len(self.keys), *self.keys, *arguments)
            return Reply._make(item.decode() if isinstance(item, bytes) else item for item in cast(list[Any], answer))
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Close the connection, if there is one."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connect(self) -> redis.Redis:
        url = self._url
        login: dict[str, Any] = {"username": url.username or None, "password": url.password or None, "db": url.db}
        if url.path:
            return redis.Redis(unix_socket_path=url.path, **login, **self._options)
        host, port = url.hosts[0]
        if url.service:
            names: dict[str, Any] = {
                "username": url.sentinel_username or None,
                "password": url.sentinel_password or None,
            }
            sentinel: Any = Sentinel(url.hosts, sentinel_kwargs={**names, **self._options})  # type: ignore[no-untyped-call]
            try:
                host, port = sentinel.discover_master(url.service)
            finally:
                sentinel.close()
        return redis.Redis(host, port, **login, **self._options)
