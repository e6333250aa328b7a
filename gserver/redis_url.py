"""Where Redis is, as one URL says it: `redis://`, `rediss://` (TLS), `unix://`, and
`redis+sentinel://`, `rediss+sentinel://`.

Pure. The first three as redis-py has them, but for its further parameters (`ssl_cert_reqs` …):
those are options of gserver. For Sentinel
`redis+sentinel://[user:password@]host:port,host:port,.../service[/db]`.
"""

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote

REDIS_PORT = 6379
SENTINEL_PORT = 26379
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
PARAMETERS = ("db", "username", "password", "sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """The parts of such a URL. `hosts` are the Sentinels where there is a `service`; a `path` is a unix socket's."""

    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    path: str = ""
    has_tls: bool = False
    db: int = 0
    username: str = ""
    password: str = ""
    sentinel_username: str = ""
    sentinel_password: str = ""

    @classmethod
    def parse(cls, text: str) -> "RedisUrl":
        """Return the parts; raise ValueError, whose text repeats nothing that may be secret."""
        scheme, authority, path, given = _split(text)
        user, _, netloc = authority.rpartition("@")
        username, _, password = user.partition(":")
        logins: dict[str, Any] = {"username": unquote(username), "password": unquote(password)}
        logins |= {name: value for name, value in given.items() if name != "db"}
        if scheme == "unix":
            if netloc or len(path) < 2:
                raise ValueError("the URL names no absolute path: write unix:///path/to/redis.sock")
            return cls(path=unquote(path), db=_number(given.get("db", "0")), **logins)
        is_sentinel = scheme.endswith("+sentinel")
        hosts = tuple(
            _host(host, SENTINEL_PORT if is_sentinel else REDIS_PORT) for host in netloc.split(",")
        )
        service, _, db = path[1:].partition("/") if is_sentinel else ("", "", path[1:])
        if is_sentinel and not service:
            raise ValueError(
                "the URL names no service: write redis+sentinel://host:port,host:port/service"
            )
        if len(hosts) > 1 and not is_sentinel:
            raise ValueError("the URL names several hosts: that is for redis+sentinel://")
        db = given.get("db", db) or "0"
        return cls(
            hosts, unquote(service), has_tls=scheme.startswith("rediss"), db=_number(db), **logins
        )

    @property
    def has_secret(self) -> bool:
        """Whether anything in it is not for the eyes of all."""
        return bool(self.password or self.sentinel_password)

    def __str__(self) -> str:
        """The URL without names and passwords, for logs."""
        db = f"/{self.db}" if self.db else ""
        if self.path:
            return f"unix://{self.path}" + (f"?db={self.db}" if self.db else "")
        scheme = ("rediss" if self.has_tls else "redis") + ("+sentinel" if self.service else "")
        hosts = ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )
        return f"{scheme}://{hosts}" + (f"/{self.service}" if self.service else "") + db


def _split(text: str) -> tuple[str, str, str, dict[str, str]]:
    """Return scheme, user and hosts, path, and parameters."""
    # Not by `urlsplit`, which refuses lists of hosts that have IPv6 addresses among them.
    found = re.fullmatch(r"([A-Za-z+]+)://([^/?#]*)([^?#]*)(?:\?([^#]*))?", text)
    if not re.match(rf"({'|'.join(map(re.escape, SCHEMES))})://", text.lower()):
        raise ValueError(f"a URL begins with {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    # What is not percent-encoded in a password would be taken for a host or a path, and be shown.
    if (
        not found
        or "@" in found[3]
        or not unquote(found[2].rpartition("@")[2] + found[3]).isprintable()
    ):
        raise ValueError(
            "this is no URL; in a password, @ / ? and # are written as %40 %2F %3F and %23"
        )
    try:
        given = dict(
            parse_qsl(found[4] or "", keep_blank_values=True, strict_parsing=bool(found[4]))
        )
    except ValueError:
        raise ValueError("the URL's parameters are not name=value&name=value") from None
    if not given.keys() <= set(PARAMETERS):
        raise ValueError(f"the URL has a parameter that is none of {', '.join(PARAMETERS)}")
    return found[1].lower(), found[2], found[3], given


def _host(text: str, default_port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]]+))(?::([0-9]{1,5}))?", text)
    host = unquote(found[2] or "") if found else ""
    address = (
        (found[1] or "").replace("%25", "%") if found else ""
    )  # With a zone, of which RFC 6874 writes the % so.
    is_other = "%25" in address or re.search(r"[][:/?#@,\s]", host)
    if not found or is_other or not 0 < int(found[3] or default_port) < 65536:
        raise ValueError("the URL has a host or port that is none")
    return address or host, int(found[3] or default_port)


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text):
        raise ValueError("the URL's database is not a number")
    return int(text)
