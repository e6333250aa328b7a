"""Every option of `serve`, named once: its default, its limits, its help and its environment names.

The command line, the documents and the tests derive from `Config`. Pure: reads no environment, no
file. A field's flag is its name with dashes, without the unit: `line_timeout_seconds` is
`--line-timeout`.
"""

import contextlib
import ipaddress
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from gserver.redis_url import RedisUrl

LISTENING = "Listening"
CLIENTS = "Clients"
STOPPING = "Stopping"
TLS = "TLS"
EXTENDING = "Extending"
CLUSTER = "Cluster (Redis)"
METRICS = "Metrics (StatsD)"
ADMIN = "Admin port (HTTP)"
LOGS = "Logs"
LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "text")
#: Names that process runners give to the same things; GSERVER_<OPTION> wins over them.
RUNNER_VARIABLES = {"port": "PORT", "workers": "WEB_CONCURRENCY", "redis_url": "REDIS_URL"}
RUNNER_VARIABLES |= {name: name.upper() for name in ("statsd_host", "statsd_port", "statsd_prefix")}


@dataclass(frozen=True, slots=True)
class Option:
    """What a person sees of a field. `parse` turns text into its value, or raises ValueError."""

    group: str
    help: str
    minimum: float = 0
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    shown_default: str | None = None


def _option(default: Any, group: str, help: str, **rest: Any) -> Any:
    return field(default=default, metadata={"option": Option(group, help, **rest)})


def parse_workers(text: str) -> int:
    """Return the number of workers; 0 stands for `auto`, one for each core."""
    if text == "auto":
        return 0
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 256:
        raise ValueError(f"{text!r} is neither a number from 1 to 256 nor auto")
    return int(text)


def parse_server_id(text: str) -> str:
    """Return the id: it is a reply on the wire, so one word of printable ASCII."""
    if not re.fullmatch(r"[!-~]{1,128}", text):
        raise ValueError(f"{text!r} is not one word of at most 128 printable ASCII characters")
    return text


def parse_statsd_prefix(text: str) -> str:
    """Return the prefix with whatever would break a StatsD line (`:`, `|`, `@`, `#`, …) made `_`, and not too long."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text).strip(".")[:128]


def parse_admin_token(text: str) -> str:
    """Return the secret; "" stands for none.

    HTTP carries printable ASCII, and removes blanks at both ends of a header. The error does not
    repeat the secret.
    """
    if not re.fullmatch(r"[ -~]*", text):
        raise ValueError("the token has characters that are not printable ASCII")
    if text != text.strip(" "):
        raise ValueError("the token begins or ends with a blank, which HTTP removes")
    return text


def parse_admin_port(text: str) -> int:
    """Return the port; -1 stands for `off`."""
    if text == "off":
        return -1
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{text!r} is neither a port from 0 to 65535 nor off")
    return int(text)


def parse_redis_url(text: str) -> str:
    """Return the URL as it is, once it is known to be one."""
    RedisUrl.parse(text)
    return text


def parse_cluster_name(text: str) -> str:
    """Return the name: it is part of the keys in Redis, between braces."""
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", text):
        raise ValueError(f"{text!r} is not 1 to 64 letters, digits, _, ., : and -")
    return text


def is_loopback(host: str) -> bool:
    """Return whether an address, or the name `localhost`, is reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def show_address(host: str, port: int) -> str:
    """Return `host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Config:
    """One server's configuration. Periods are seconds; 0 switches off what its help says it does."""

    host: str = _option("127.0.0.1", LISTENING, "Address to listen on; 0.0.0.0 or :: for all.")
    port: int = _option(4242, LISTENING, "Port to listen on; 0 = any free one.", maximum=65535)
    backlog: int = _option(
        1024,
        LISTENING,
        "Connections that the kernel may hold before accept.",
        minimum=1,
        maximum=65535,
    )
    workers: int = _option(
        1,
        LISTENING,
        "Worker processes, or auto: one for each core.",
        parse=parse_workers,
        metavar="N|auto",
    )
    user: str = _option(
        "", LISTENING, "User to serve as, where root starts it.", metavar="NAME[:GROUP]"
    )
    server_id: str = _option(
        "",
        LISTENING,
        "What WHERE answers [default: a new UUID].",
        parse=parse_server_id,
        metavar="ID",
    )
    max_clients: int = _option(
        10000, CLIENTS, "Clients at once, over all workers.", minimum=1, maximum=10_000_000
    )
    max_clients_per_address: int = _option(
        0,
        CLIENTS,
        "Clients of one address at once (IPv6: of one /64); 0 = no limit.",
        maximum=10_000_000,
    )
    max_line_bytes: int = _option(
        1024, CLIENTS, "Longest line, its ending not counted.", minimum=5, maximum=65536
    )
    line_timeout_seconds: float = _option(
        10.0, CLIENTS, "Time from a line's first byte to its end; 0 = no limit."
    )
    idle_timeout_seconds: float = _option(
        0.0, CLIENTS, "Time a client may say nothing; 0 = no limit."
    )
    write_timeout_seconds: float = _option(
        10.0, CLIENTS, "Time a client may leave its replies unread; 0 = 2 minutes."
    )
    unterminated_after_seconds: float = _option(
        0.1,
        CLIENTS,
        "Silence after which a whole command without its newline is answered; 0 = never.",
    )
    tls_cert: str = _option(
        "",
        TLS,
        "Certificate (PEM, those that lead to its CA after it): the port speaks TLS.",
        metavar="FILE",
    )
    tls_key: str = _option(
        "", TLS, "Its private key (PEM) [default: in the file of --tls-cert].", metavar="FILE"
    )
    tls_client_ca: str = _option(
        "", TLS, "CA (PEM) that clients need a certificate of.", metavar="FILE"
    )
    tls_handshake_timeout_seconds: float = _option(
        5.0, TLS, "Time for the handshake; 0 = no limit."
    )
    drain_timeout_seconds: float = _option(
        4.0, STOPPING, "Time from a stop to the exit, at most; what is busy then is cut off."
    )
    drain_delay_seconds: float = _option(
        0.0,
        STOPPING,
        "Time to go on accepting and serving after SIGTERM or SIGUSR2, for balancers to notice.",
    )
    hang_timeout_seconds: float = _option(
        10.0, STOPPING, "Time without a sign of life after which a process is replaced; 0 = never."
    )
    commands: str = _option(
        "", EXTENDING, "Python module with commands of your own.", metavar="MODULE"
    )
    redis_url: str = _option(
        "",
        CLUSTER,
        "Redis of the cluster [default: none, a server alone].",
        parse=parse_redis_url,
        metavar="URL",
    )
    redis_ca_file: str = _option(
        "", CLUSTER, "CA certificate for rediss:// [default: the system's].", metavar="FILE"
    )
    redis_tls_verify: str = _option(
        "yes", CLUSTER, "Whether its certificate must be right.", choices=("yes", "no")
    )
    cluster_name: str = _option(
        "gserver", CLUSTER, "Name of the cluster.", parse=parse_cluster_name, metavar="NAME"
    )
    heartbeat_interval_seconds: float = _option(
        0.5, CLUSTER, "Time from one report to Redis to the next.", minimum=0.1
    )
    member_ttl_seconds: float = _option(
        5.0, CLUSTER, "Time without one after which a server is taken for dead."
    )
    on_cluster_loss: str = _option(
        "last-known",
        CLUSTER,
        "What WHO says when the others have not been heard of for --cluster-max-age: own clients and the last known of"
        " others, own alone, or an ERR.",
        choices=("last-known", "local", "error"),
    )
    cluster_max_age_seconds: float = _option(
        30.0, CLUSTER, "Age of that knowledge from which it is too old."
    )
    statsd_host: str = _option("", METRICS, "StatsD daemon [default: none, no metrics are sent].")
    statsd_port: int = _option(8125, METRICS, "Its UDP port.", minimum=1, maximum=65535)
    statsd_prefix: str = _option(
        "gserver", METRICS, "First part of every name.", parse=parse_statsd_prefix
    )
    admin_port: int = _option(
        -1,
        ADMIN,
        "Port for health, metrics and status; 0 = any free one.",
        minimum=-1,
        parse=parse_admin_port,
        metavar="PORT|off",
        shown_default="off",
    )
    admin_host: str = _option("127.0.0.1", ADMIN, "Address of that port.")
    admin_token: str = _option(
        "",
        ADMIN,
        "Secret to ask for; needed where the address is not loopback.",
        parse=parse_admin_token,
        metavar="TEXT",
    )
    log_level: str = _option("info", LOGS, "Least level to log.", choices=LEVELS)
    log_format: str = _option(
        "auto", LOGS, "auto = text on a terminal, json elsewhere.", choices=FORMATS
    )

    @property
    def needs_agent(self) -> bool:
        """Whether there is anything for an agent to do."""
        return bool(self.statsd_host or self.redis_url) or self.admin_port >= 0

    def hang_seconds(self, *, is_agent: bool) -> float:
        """Return the silence after which a process counts as hung, in seconds; 0 = never.

        The agent of a cluster is always watched: it must be replaced before its TTL is over.
        """
        limit = self.hang_timeout_seconds
        if not (is_agent and self.redis_url):
            return limit
        return min(limit or math.inf, self.member_ttl_seconds / 3)

    @property
    def settle_seconds(self) -> float:
        """How long a start waits at most to know whether the server's id is free: three beats of who may hold it."""
        return max(1.8, 3 * self.heartbeat_interval_seconds)

    @property
    def address_cells(self) -> int:
        """In how many cells each worker counts clients by address: as many for each client at least, or none."""
        return 2 * max(65536, self.max_clients) if self.max_clients_per_address else 0

    @property
    def contradiction(self) -> str:
        """Which options contradict each other, and how; "" when none do."""
        beat, ttl, age = (
            self.heartbeat_interval_seconds,
            self.member_ttl_seconds,
            self.cluster_max_age_seconds,
        )
        if ttl < 5 * beat - 1e-9:
            return f"--member-ttl {ttl:g} is too short: at least five times --heartbeat-interval, which is {beat:g}"
        if age < 2 * beat:
            return f"--cluster-max-age {age:g} is too short: at least twice --heartbeat-interval, which is {beat:g}"
        if self.admin_port >= 0 and not self.admin_token and not is_loopback(self.admin_host):
            return f"--admin-host {self.admin_host} can be reached from elsewhere: give it an --admin-token too"
        if (self.tls_key or self.tls_client_ca) and not self.tls_cert:
            return f"{'--tls-key' if self.tls_key else '--tls-client-ca'} is for a port with TLS: give --tls-cert too"
        if self.redis_ca_file and not RedisUrl.parse(self.redis_url or "redis://-").has_tls:
            return "--redis-ca-file is for a --redis-url with TLS: rediss://"
        return ""


OPTIONS: dict[str, Option] = {item.name: item.metadata["option"] for item in fields(Config)}


def flag(name: str) -> str:
    """Return the flag of a field: `line_timeout_seconds` gives `--line-timeout`."""
    return "--" + name.removesuffix("_seconds").replace("_", "-")


def environment_names(name: str) -> list[str]:
    """Return the environment variables of a field, the one that wins first."""
    own = "GSERVER_" + flag(name).removeprefix("--").replace("-", "_").upper()
    return [own, RUNNER_VARIABLES[name]] if name in RUNNER_VARIABLES else [own]
