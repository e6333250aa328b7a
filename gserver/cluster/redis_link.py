"""One connection to Redis, and the names of its errors.

Any error drops the connection. So a late reply cannot be taken for the next one (redis-py issue
4292), and a primary that was demoted is not asked again: the next call connects again, and asks the
Sentinels first.

A name may lead to another Redis while the old one lives. So the connection is replaced now and then
by a new one, which looks the name up. It is opened beside the old one: no heartbeat waits for it.
"""

import hashlib
import re
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import gevent
import redis
from redis._parsers import _RESP2Parser
from redis.backoff import NoBackoff
from redis.retry import Retry

from gserver import logs
from gserver.cluster.membership import Heartbeat, Reply
from gserver.cluster.sentinel import SentinelFollower
from gserver.config import Config
from gserver.redis_errors import HEARTBEAT_ERRORS
from gserver.redis_url import RedisUrl

#: For a connect and for each reply, of Redis or of a Sentinel; a tenth of the TTL if that is less.
TIMEOUT_SECONDS = 0.5
#: Elements of a reply, nested ones included. The longest reply of ours has about 600.
MAX_REPLY_PARTS = 10_000
#: Limit on opening another connection beside the one in use.
RENEWAL_SECONDS = 2.0
HEARTBEAT_SCRIPT = Path(__file__).with_name("heartbeat.lua").read_text()

Parsed = TypeVar("Parsed")


@cache
def sha1_of(script: str) -> str:
    """Return the digest by which Redis knows a script that it has run before."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def kind_of(error: BaseException) -> str:
    """Return the kind of an error: a key of HEARTBEAT_ERRORS."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 10:
        texts.append(f"{type(cause).__name__} {cause}")
        cause = cause.__cause__ or cause.__context__
    return next(
        kind for kind, pattern in HEARTBEAT_ERRORS.items() if re.search(pattern, "\n".join(texts))
    )


def _parse_reply(raw: Any) -> Reply:
    """Return the reply of heartbeat.lua; raise an error if it has another form."""
    reply = Reply(*raw)
    texts = {"holder", "listed", "gone"}
    numbers = [value for name, value in reply._asdict().items() if name not in texts]
    has_form = (
        all(isinstance(number, int) and 0 <= number < 2**53 for number in numbers)
        and all(isinstance(text, bytes) for text in (*reply.listed, reply.gone))
        and len(reply.listed) % 3 == 0
    )
    if not has_form:
        raise ValueError("the reply does not have the script's form")
    return reply._replace(holder=raw[5].decode(), listed=tuple(reply.listed))


class _BoundedParser(_RESP2Parser):
    """Rejects a reply of too many elements.

    redis-py has no public limit. While it parses an endless reply, no other greenlet of the agent
    runs, so not even a timeout of gevent can end it.
    """

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        self._parts = 0
        return super().read_response(*args, **kwargs)

    def _read_response(self, *args: Any, **kwargs: Any) -> Any:
        self._parts += 1
        if self._parts > MAX_REPLY_PARTS:
            raise redis.InvalidResponse("the reply has too many elements")
        return super()._read_response(*args, **kwargs)


class RedisLink:
    """At most one connection in use, opened when it is needed. `keys` are those of the scripts."""

    def __init__(self, config: Config) -> None:
        self._url = url = RedisUrl.parse(config.redis_url)
        # One hash tag, so all keys are in one slot of a Redis Cluster.
        self.keys = [
            f"{{gserver:{config.cluster_name}}}:{name}" for name in ("members", "leases", "state")
        ]
        self._client: redis.Redis | None = None
        #: The connection that was replaced, although it worked: see `has_moved`.
        self._previous: redis.Redis | None = None
        #: Opens the next connection.
        self._renewal: gevent.Greenlet[[], redis.Redis | None] | None = None
        #: The node of a Redis Cluster that has the keys, if that is not the one of the URL.
        self._node: tuple[str, int] | None = None
        self._options = _client_options(config, url)
        self._sentinels = None
        if url.service:
            # Within a TTL all servers have found the new primary, so no lease ends there.
            check_seconds = config.member_ttl_seconds / 4
            self._sentinels = SentinelFollower(url, check_seconds, self._open_client)

    def __str__(self) -> str:
        """Return the URL without its secrets."""
        return str(self._url)

    def send(self, heartbeat: Heartbeat) -> Reply:
        """Run heartbeat.lua; raise like `run`."""
        return self.run(HEARTBEAT_SCRIPT, _parse_reply, *heartbeat)

    def run(self, script: str, parse: Callable[[Any], Parsed], *args: str | int) -> Parsed:
        """Run a script on `keys` and return what `parse` makes of its reply.

        Raises the errors of `parse`, of redis-py and of the system. Any error drops the connection.
        """
        try:
            if self._client is None or (self._sentinels and self._sentinels.has_moved()):
                self.drop()
                self._client = self._connect()
            result = self._run_renewed(script, parse, *args)
            return result or parse(self._call(script, *args))
        except BaseException:
            self.drop()
            self._node = None
            if self._sentinels:
                self._sentinels.skip()  # The error may come from the address that it has given.
            raise

    def _call(self, script: str, *args: str | int) -> Any:
        """Run a script, on the node of a Redis Cluster that has the keys."""
        try:
            return self._evaluate(script, *args)
        except redis.exceptions.MovedError as error:
            self._node = error.host or self._url.hosts[0][0], error.port
        self.drop()
        self._client = self._connect()
        return self._evaluate(script, *args)

    def _evaluate(self, script: str, *args: str | int) -> Any:
        client = cast(redis.Redis, self._client)
        try:
            return client.evalsha(sha1_of(script), len(self.keys), *self.keys, *args)
        except redis.exceptions.NoScriptError:
            return client.eval(script, len(self.keys), *self.keys, *args)

    def renew(self) -> None:
        """Replace the connection soon, if another one can be opened.

        With Sentinels, they say where the primary is, and are asked often enough.
        """
        if self._renewal is None and self._client and not (self._url.path or self._sentinels):
            self._renewal = gevent.spawn(self._open_another)

    def _open_another(self) -> redis.Redis | None:
        client = self._connect()
        try:
            with gevent.Timeout(RENEWAL_SECONDS, TimeoutError(f"not within {RENEWAL_SECONDS} s")):
                client.time()  # Opens the connection.
        except Exception as error:  # noqa: BLE001 - any failure: the old one stays
            self._report_renewal(error)
        except gevent.GreenletExit:  # It is not needed any more.
            client.close()
            raise
        else:
            return client
        client.close()
        return None

    def _report_renewal(self, error: Exception) -> None:
        reason = self.explain(error)
        message = f"the connection to Redis at {self} cannot be replaced, so it stays: {reason}"
        logs.warn_ratelimited("cluster.not_renewed", message)

    def _run_renewed(self, script: str, parse: Callable[[Any], Parsed], *args: Any) -> Any:
        """Return the result over the next connection if it is open and works; None otherwise."""
        if self._client is None or self._renewal is None or not self._renewal.ready():
            return None
        renewed, self._renewal = self._renewal.value, None
        if not renewed:
            return None
        self.forget_previous()
        self._client, previous = renewed, self._client
        try:
            result = parse(self._call(script, *args))
        except Exception as error:  # noqa: BLE001 - it may be a replica: the old one stays
            self._report_renewal(error)
            self.drop()
            self._client = previous
            return None
        except BaseException:
            previous.close()
            raise
        self._previous = previous
        return result

    def has_moved(self, lost_at: int) -> bool:
        """Whether the connection in use leads to another Redis than the one that it replaced.

        Then the replaced one still has the data that were lost last at `lost_at`.
        """
        if self._previous is None:
            return False
        try:
            return self._previous.hget(self.keys[2], "lost_at") == str(lost_at).encode()
        except (redis.RedisError, OSError):
            return False

    def forget_previous(self) -> None:
        """Close the connection that was replaced, if there is one."""
        previous, self._previous = self._previous, None
        if previous is not None:
            previous.close()

    def explain(self, error: BaseException) -> str:
        """Return the text of an error without the secrets that Redis may have repeated in it."""
        text = str(error)
        for secret in (self._url.password, self._url.sentinel_password):
            for form in (secret, quote(secret, safe="")) if secret else ():
                text = text.replace(form, "***")
        return text

    def drop(self) -> None:
        """Close all connections, also those that were replaced or are being opened."""
        client, self._client = self._client, None
        renewal, self._renewal = self._renewal, None
        self.forget_previous()
        if renewal is not None:
            renewal.kill()
        for each in (client, renewal.value if renewal is not None else None):
            if isinstance(each, redis.Redis):
                each.close()

    def _connect(self) -> redis.Redis:
        url = self._url
        login: dict[str, Any] = {
            "username": url.username or None,
            "password": url.password or None,
            "db": url.db,
        }
        if url.path:
            return self._open_client(unix_socket_path=url.path, **login)
        host, port = self._node or url.hosts[0]
        if self._sentinels:
            host, port = self._sentinels.find_primary()
        return self._open_client(host=host, port=port, **login)

    def _open_client(self, **address_and_login: Any) -> redis.Redis:
        client = redis.Redis(**address_and_login, **self._options)
        client.connection_pool.connection_kwargs["parser_class"] = _BoundedParser
        return client


def _client_options(config: Config, url: RedisUrl) -> dict[str, Any]:
    timeout = min(TIMEOUT_SECONDS, config.member_ttl_seconds / 10)
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "socket_keepalive": True,
        # Otherwise the kernel would retransmit a heartbeat for minutes after it was given up, and
        # could bring back a server that has gone by then.
        "socket_keepalive_options": {socket.TCP_USER_TIMEOUT: round(timeout * 1000)},
        # By default redis-py retries ten times, for five seconds each. Here the next heartbeat is
        # the retry.
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "driver_info": None,
    }
    if url.has_tls:
        is_verified = config.redis_tls_verify == "yes"
        options |= {
            "ssl": True,
            "ssl_cert_reqs": "required" if is_verified else "none",
            "ssl_check_hostname": is_verified,
            "ssl_ca_certs": config.redis_ca_file or None,
        }
    return options
