"""The addresses of Redis: one URL, or several with blanks between them.

Pure. The schemes are `redis://`, `rediss://` (TLS), `unix://`, and for Sentinel
`redis+sentinel://` and `rediss+sentinel://`. The first three are those of redis-py, without its
further parameters (`ssl_cert_reqs` …), which are options of gserver. The form for Sentinel is
`redis+sentinel://[user:password@]host:port,host:port,.../service[/db]`.
"""

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote

REDIS_PORT = 6379
SENTINEL_PORT = 26379
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
#: Redis servers that a cluster may use at once.
MAX_URLS = 3
PARAMETERS = ("db", "username", "password", "sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """The parts of a URL.

    With a `service`, `hosts` are the Sentinels. `path` is that of a unix socket.
    """

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
        """Return the parts; raise ValueError, whose text never repeats a part of the URL."""
        scheme, authority, path, parameters = _split(text)
        user, _, netloc = authority.rpartition("@")
        username, _, password = user.partition(":")
        logins: dict[str, Any] = {"username": unquote(username), "password": unquote(password)}
        logins |= {name: value for name, value in parameters.items() if name != "db"}
        is_sentinel = scheme.endswith("+sentinel")
        if not is_sentinel and any(name.startswith("sentinel_") for name in parameters):
            raise ValueError("sentinel_username and sentinel_password need redis+sentinel://")
        if scheme == "unix":
            if netloc or len(path) < 2:
                raise ValueError("the URL has no absolute path: write unix:///path/to/redis.sock")
            return cls(path=unquote(path), db=_db(parameters.get("db", "0")), **logins)
        default_port = SENTINEL_PORT if is_sentinel else REDIS_PORT
        hosts = tuple(_host(host, default_port) for host in netloc.split(","))
        service, _, db = path[1:].partition("/") if is_sentinel else ("", "", path[1:])
        if is_sentinel and not service:
            raise ValueError(
                "the URL has no service: write redis+sentinel://host:port,host:port/service"
            )
        if len(hosts) > 1 and not is_sentinel:
            raise ValueError("the URL has several hosts: only redis+sentinel:// allows that")
        return cls(
            hosts,
            unquote(service),
            has_tls=scheme.startswith("rediss"),
            db=_db(parameters.get("db", db) or "0"),
            **logins,
        )

    @property
    def has_secret(self) -> bool:
        """Whether the URL contains a password."""
        return bool(self.password or self.sentinel_password)

    def __str__(self) -> str:
        """Return the URL without names and passwords, for logs."""
        if self.path:
            return f"unix://{self.path}" + (f"?db={self.db}" if self.db else "")
        scheme = ("rediss" if self.has_tls else "redis") + ("+sentinel" if self.service else "")
        hosts = ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )
        service = f"/{self.service}" if self.service else ""
        db = f"/{self.db}" if self.db else ""
        return f"{scheme}://{hosts}{service}{db}"


def parse_urls(text: str) -> tuple[RedisUrl, ...]:
    """Return the parts of one URL, or of several with blanks between them; raise like `parse`."""
    texts = text.split() or [text]  # Blank text has an error of its own.
    urls = tuple(map(RedisUrl.parse, texts))
    if len(urls) > MAX_URLS:
        raise ValueError(f"there are {len(urls)} URLs, and at most {MAX_URLS} are allowed")
    if len({str(url) for url in urls}) < len(urls):
        raise ValueError("two of the URLs are the same: each must be a Redis of its own")
    return urls


def _split(text: str) -> tuple[str, str, str, dict[str, str]]:
    """Return scheme, user and hosts, path, and parameters."""
    # Not by `urlsplit`, which refuses a list of hosts that includes an IPv6 address.
    found = re.fullmatch(r"([A-Za-z+]+)://([^/?#]*)([^?#]*)(?:\?([^#]*))?", text)
    if not re.match(rf"({'|'.join(map(re.escape, SCHEMES))})://", text.lower()):
        raise ValueError(
            f"the URL must begin with {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
        )
    # Part of a password that is not percent-encoded would be read as a host or a path, and logged.
    if not found or "@" in found[3] or not _is_printable(found[2].rpartition("@")[2] + found[3]):
        raise ValueError(
            "this is not a valid URL; in a password, write %40 %2F %3F and %23 for @ / ? and #"
        )
    parameters = _parameters(found[4] or "")
    return found[1].lower(), found[2], found[3], parameters


def _is_printable(text: str) -> bool:
    return unquote(text).isprintable()


def _parameters(query: str) -> dict[str, str]:
    if not query:
        return {}
    try:
        parameters = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True))
    except ValueError:
        raise ValueError("the URL's parameters must be name=value&name=value") from None
    if not parameters.keys() <= set(PARAMETERS):
        raise ValueError(f"the URL has an unknown parameter; allowed: {', '.join(PARAMETERS)}")
    return parameters


def _host(text: str, default_port: int) -> tuple[str, int]:
    """Return a host and its port. The host is a name, an IPv4 address or an [IPv6 address]."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]]+))(?::([0-9]{1,5}))?", text)
    if not found:
        raise ValueError("the URL has an invalid host or port")
    # RFC 6874 writes the % before the zone of an address as %25.
    address = (found[1] or "").replace("%25", "%")
    name = unquote(found[2] or "")
    port = int(found[3] or default_port)
    if "%25" in address or re.search(r"[][:/?#@,\s]", name) or not 0 < port < 65536:
        raise ValueError("the URL has an invalid host or port")
    return address or name, port


def _db(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text):
        raise ValueError("the URL's database is not a number")
    return int(text)
