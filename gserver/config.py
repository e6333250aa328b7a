"""Every option of `serve`, declared once: default, limits, help and environment variables.

The command line, the documents and the tests derive from `Config`. This module is pure: it reads
neither the environment nor a file. A field's flag is its name with dashes and without the unit:
`line_timeout_seconds` is `--line-timeout`.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any
from urllib.parse import urlsplit

from gserver import addresses
from gserver.addresses import (
    Endpoint,
    Network,
    hosts_overlap,
    is_loopback,
    parse_endpoint,
    parse_networks,
)
from gserver.redis_url import parse_urls

# Groups of options, in the order of `gserver --help`.
LISTENING = "Listening"
CLIENTS = "Clients"
STOPPING = "Stopping and restarting"
TLS = "TLS"
COMMANDS = "Custom commands"
CLUSTER = "Cluster (Redis)"
METRICS = "Metrics (StatsD)"
ADMIN = "Admin port (HTTP)"
LOGS = "Logs"
LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "text")
#: Variables that process runners and hosting platforms set. GSERVER_<OPTION> wins over them.
RUNNER_VARIABLES = {
    "port": "PORT",
    "workers": "WEB_CONCURRENCY",
    "redis_url": "REDIS_URL",
    "statsd_host": "STATSD_HOST",
    "statsd_port": "STATSD_PORT",
    "statsd_prefix": "STATSD_PREFIX",
}
#: Set by a supervisor that replaces its own program, for the new one. It is no option.
UPGRADE_VARIABLE = "GSERVER_UPGRADE_FD"
#: Options whose value may be a secret. The option `<name>_file` names a file with the value.
SECRETS = ("redis_url", "admin_token")

# By which part of --drain-timeout a drain has taken each step.
#: Workers are told to end, even if an agent that a reload terminates has not ended yet.
OLD_AGENT_SHARE = 0.35
#: A worker cuts off the clients that are left.
CLIENTS_SHARE = 0.75
#: Workers that still run are killed.
WORKERS_SHARE = 0.85
#: The agent is killed if it still runs.
AGENT_SHARE = 0.92


@dataclass(frozen=True, slots=True)
class Option:
    """How a field appears on the command line.

    `parse` turns text into a value, or raises ValueError with a reason for people.
    """

    group: str
    help: str
    minimum: float = 0
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    metavar: str | None = None
    shown_default: str | None = None
    #: Whether the flag may be repeated. The values are one text, with blanks between them.
    is_repeatable: bool = False


def _option(default: Any, group: str, help_text: str, **rest: Any) -> Any:
    return field(default=default, metadata={"option": Option(group, help_text, **rest)})


def parse_workers(text: str) -> int:
    """Return the number of workers; 0 stands for `auto`, one per core."""
    if text == "auto":
        return 0
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 256:
        raise ValueError(f"{text!r} is neither a number from 1 to 256 nor auto")
    return int(text)


def parse_server_id(text: str) -> str:
    """Return the id. It is a reply on the wire, so it must be one word of printable ASCII."""
    if not re.fullmatch(r"[!-~]{1,128}", text):
        raise ValueError(f"{text!r} is not one word of at most 128 printable ASCII characters")
    return text


def parse_statsd_prefix(text: str) -> str:
    """Return the prefix, cut to 128 characters, with `_` for characters that StatsD reserves."""
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


def parse_admin_url(text: str) -> str:
    """Return the URL unchanged if it is valid. It is public, so errors do not repeat it."""
    if not re.fullmatch(r"https?://[!-~]{1,120}", text):
        raise ValueError("the URL is not http:// or https:// and at most 120 printable characters")
    try:
        parts = urlsplit(text)
        is_valid = parts.hostname and parts.port != 0  # An invalid port raises ValueError.
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError("the URL has no host, or its port is invalid")
    if parts.username is not None:
        raise ValueError("the URL contains a user name, but all servers of the cluster show it")
    return text


def parse_admin_port(text: str) -> int:
    """Return the port; -1 stands for `off`."""
    if text == "off":
        return -1
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{text!r} is neither a port from 0 to 65535 nor off")
    return int(text)


def parse_proxy_from(text: str) -> str:
    """Return the networks, with a comma between each two, if they are valid."""
    return ",".join(map(str, parse_networks(text)))


def parse_bind(text: str) -> str:
    """Return the endpoints, with a blank between each two, if they are valid."""
    if not text.split():
        raise ValueError("it names no endpoint: use tcp://HOST:PORT, tls://HOST:PORT or unix:PATH")
    return addresses.show_endpoints(map(parse_endpoint, text.split()))


def parse_redis_url(text: str) -> str:
    """Return the URLs, with a blank between each two, if they are valid."""
    parse_urls(text)
    return " ".join(text.split())


def parse_cluster_name(text: str) -> str:
    """Return the name. It is part of the keys in Redis, between braces."""
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", text):
        raise ValueError(f"{text!r} is not 1 to 64 letters, digits, _, ., : and -")
    return text


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of one server. Times are seconds. The help says where 0 means no limit."""

    host: str = _option("127.0.0.1", LISTENING, "Address to listen on; 0.0.0.0 or :: for all.")
    port: int = _option(4242, LISTENING, "Port to listen on; 0 = any free port.", maximum=65535)
    bind: str = _option(
        "",
        LISTENING,
        "Address to listen on: tcp://HOST:PORT, tls://HOST:PORT or unix:PATH[?mode=0660]; may be"
        " repeated (in the variable: separated by blanks) [default: --host and --port].",
        parse=parse_bind,
        metavar="URL",
        is_repeatable=True,
    )
    backlog: int = _option(
        1024,
        LISTENING,
        "Connections that the kernel queues before accept.",
        minimum=1,
        maximum=65535,
    )
    workers: int = _option(
        1,
        LISTENING,
        "Worker processes; auto = one per core.",
        parse=parse_workers,
        metavar="N|auto",
    )
    proxy_from: str = _option(
        "",
        LISTENING,
        "Networks whose connections begin with a PROXY header, which has the client's address"
        " [default: none].",
        parse=parse_proxy_from,
        metavar="CIDR[,CIDR...]",
    )
    proxy_header_timeout_seconds: float = _option(
        5.0, LISTENING, "Time limit for a PROXY header; 0 = no limit."
    )
    user: str = _option("", LISTENING, "Serve as this user; needs root.", metavar="NAME[:GROUP]")
    server_id: str = _option(
        "",
        LISTENING,
        "Reply to WHERE; must be unique [default: a new UUID].",
        parse=parse_server_id,
        metavar="ID",
    )
    max_clients: int = _option(
        10000, CLIENTS, "Maximum clients over all workers.", minimum=1, maximum=10_000_000
    )
    max_clients_per_address: int = _option(
        0,
        CLIENTS,
        "Maximum clients per IPv4 address or IPv6 /64; 0 = no limit.",
        maximum=10_000_000,
    )
    max_line_bytes: int = _option(
        1024, CLIENTS, "Maximum line length, without the line ending.", minimum=5, maximum=65536
    )
    line_timeout_seconds: float = _option(
        10.0, CLIENTS, "Time for a line to arrive, from its first byte; 0 = no limit."
    )
    idle_timeout_seconds: float = _option(
        0.0, CLIENTS, "Close a client that sends nothing for this long; 0 = never."
    )
    write_timeout_seconds: float = _option(
        10.0, CLIENTS, "Time that a client has to read waiting replies; 0 = 2 minutes."
    )
    unterminated_after_seconds: float = _option(
        0.1, CLIENTS, "Reply to a command without a newline after this much silence; 0 = never."
    )
    tls_cert: str = _option(
        "",
        TLS,
        "Certificate chain (PEM); without --bind, the port then speaks only TLS.",
        metavar="FILE",
    )
    tls_key: str = _option(
        "",
        TLS,
        "Private key of the certificate (PEM) [default: in the --tls-cert file].",
        metavar="FILE",
    )
    tls_client_ca: str = _option(
        "", TLS, "Require client certificates signed by this CA (PEM).", metavar="FILE"
    )
    tls_handshake_timeout_seconds: float = _option(
        5.0, TLS, "Time limit for the handshake; 0 = no limit."
    )
    drain_timeout_seconds: float = _option(
        4.0, STOPPING, "Time limit for a drain, and for serving connected clients after SIGUSR2."
    )
    drain_delay_seconds: float = _option(
        0.0, STOPPING, "Keep accepting clients for this long after SIGTERM or SIGUSR2."
    )
    drain_spread_seconds: float = _option(
        0.0,
        STOPPING,
        "Close the clients of a drain evenly over this time, half of --drain-timeout at most;"
        " 0 = at once.",
    )
    hang_timeout_seconds: float = _option(
        10.0,
        STOPPING,
        "Replace a process whose heartbeat stops for this long (at least 1); 0 = never.",
    )
    commands: str = _option(
        "", COMMANDS, "Python module that defines more commands.", metavar="MODULE"
    )
    command_timeout_seconds: float = _option(
        30.0, COMMANDS, "Interrupt a custom command that runs for this long; 0 = never."
    )
    command_at_once: int = _option(
        1000, COMMANDS, "Runs of one custom command at the same time in a worker; 0 = no limit."
    )
    slow_command_seconds: float = _option(
        1.0, COMMANDS, "Log a custom command that takes this long; 0 = never."
    )
    redis_url: str = _option(
        "",
        CLUSTER,
        "URL of the cluster's Redis, or up to three URLs with blanks between them [default: none,"
        " a single server].",
        parse=parse_redis_url,
        metavar="URL",
    )
    redis_url_file: str = _option(
        "", CLUSTER, "File that contains the URL of Redis.", metavar="FILE"
    )
    redis_ca_file: str = _option(
        "", CLUSTER, "CA of Redis's certificate (PEM) [default: the system's].", metavar="FILE"
    )
    redis_tls_verify: str = _option(
        "yes", CLUSTER, "Verify Redis's certificate.", choices=("yes", "no")
    )
    cluster_name: str = _option(
        "gserver",
        CLUSTER,
        "Servers with the same name form a cluster.",
        parse=parse_cluster_name,
        metavar="NAME",
    )
    heartbeat_interval_seconds: float = _option(
        0.5, CLUSTER, "Time between two heartbeats to Redis.", minimum=0.1
    )
    member_ttl_seconds: float = _option(
        5.0, CLUSTER, "A server expires after this long without a heartbeat."
    )
    on_cluster_loss: str = _option(
        "last-known",
        CLUSTER,
        "Reply to WHO when the count of the other servers is too old: own clients plus that count,"
        " own clients only, or an error.",
        choices=("last-known", "local", "error"),
    )
    cluster_max_age_seconds: float = _option(
        30.0, CLUSTER, "Age at which the count of the other servers is too old."
    )
    statsd_host: str = _option("", METRICS, "Host of the StatsD daemon [default: none].")
    statsd_port: int = _option(
        8125, METRICS, "UDP port of the StatsD daemon.", minimum=1, maximum=65535
    )
    statsd_prefix: str = _option(
        "gserver", METRICS, "Prefix of all metric names.", parse=parse_statsd_prefix
    )
    admin_port: int = _option(
        -1,
        ADMIN,
        "Port for health checks, metrics and status; 0 = any free port.",
        minimum=-1,
        parse=parse_admin_port,
        metavar="PORT|off",
        shown_default="off",
    )
    admin_host: str = _option("127.0.0.1", ADMIN, "Address of the admin port.")
    admin_token: str = _option(
        "",
        ADMIN,
        "Token that callers must send; required unless --admin-host is loopback.",
        parse=parse_admin_token,
        metavar="TEXT",
    )
    admin_token_file: str = _option(
        "", ADMIN, "File that contains the admin token.", metavar="FILE"
    )
    admin_url: str = _option(
        "",
        ADMIN,
        "URL of this server's page, for links on the pages of the cluster's other servers.",
        parse=parse_admin_url,
        metavar="URL",
    )
    log_level: str = _option("info", LOGS, "Lowest level to log.", choices=LEVELS)
    log_format: str = _option(
        "auto",
        LOGS,
        "Format of the log; auto = text on a terminal, otherwise json.",
        choices=FORMATS,
    )

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The endpoints, at least one."""
        if self.bind:
            return tuple(map(parse_endpoint, self.bind.split()))
        transport = addresses.TLS if self.tls_cert else addresses.TCP
        return (Endpoint(transport, self.host, self.port),)

    def with_endpoints(self, endpoints: Sequence[Endpoint]) -> "Config":
        """Return it with the endpoints that were opened: their ports are known now."""
        first = endpoints[0]
        if not self.bind and [endpoint.transport for endpoint in endpoints] == [
            self.endpoints[0].transport
        ]:
            return replace(self, host=first.host, port=first.port)
        return replace(self, bind=addresses.show_endpoints(endpoints))

    @property
    def balancers(self) -> tuple[Network, ...]:
        """The networks of `--proxy-from`."""
        return parse_networks(self.proxy_from) if self.proxy_from else ()

    @property
    def needs_agent(self) -> bool:
        """Whether an agent process has anything to do."""
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
        """How long a start waits to learn if its id is free: three reports of a live holder."""
        return max(1.8, 3 * self.heartbeat_interval_seconds)

    @property
    def address_cells(self) -> int:
        """Cells in which each worker counts clients by address: twice the clients; 0 = no limit."""
        return 2 * max(65536, self.max_clients) if self.max_clients_per_address else 0

    def for_worker(self) -> "Config":
        """Return what a worker may know: no secret, and the Redis URL without its passwords.

        The URL tells it that there is a cluster.
        """
        values: dict[str, Any] = dict.fromkeys(SECRETS, "")
        if self.redis_url:
            values["redis_url"] = " ".join(map(str, parse_urls(self.redis_url)))
        return replace(self, **values)

    @property
    def engines(self) -> "tuple[Config, ...]":
        """The configuration for each Redis of the cluster, with its URL alone."""
        return tuple(replace(self, redis_url=url) for url in self.redis_url.split())

    @property
    def contradiction(self) -> str:
        """The first contradiction between options, as one line; "" if there is none."""
        return (
            self._cluster_contradiction
            or self._listening_contradiction
            or self._stopping_contradiction
        )

    @property
    def _cluster_contradiction(self) -> str:
        interval, ttl = self.heartbeat_interval_seconds, self.member_ttl_seconds
        max_age = self.cluster_max_age_seconds
        which = f"--heartbeat-interval ({interval:g})"
        if ttl < 5 * interval - 1e-9:  # The rounding error of 5 * 0.3, say.
            return f"--member-ttl {ttl:g} is too short: at least five times {which}"
        if max_age < 3 * interval - 1e-9:  # Without faults it is below twice the interval.
            return f"--cluster-max-age {max_age:g} is too short: at least three times {which}"
        if self.redis_ca_file and not any(
            url.has_tls for url in parse_urls(self.redis_url or "redis://-")
        ):
            return "--redis-ca-file needs a --redis-url with TLS (rediss://)"
        return ""

    @property
    def _stopping_contradiction(self) -> str:
        spread, timeout = self.drain_spread_seconds, self.drain_timeout_seconds
        if spread > timeout / 2:
            limit = f"at most half of --drain-timeout ({timeout:g})"
            return f"--drain-spread {spread:g} is too long: {limit}"
        return ""

    @property
    def _listening_contradiction(self) -> str:
        if self.admin_port >= 0 and not self.admin_token and not is_loopback(self.admin_host):
            where = f"--admin-host {self.admin_host}"
            return f"{where} is not loopback: set --admin-token, too"
        if self.tls_key and not self.tls_cert:
            return "--tls-key needs --tls-cert"
        if self.tls_client_ca and not self.tls_cert:
            return "--tls-client-ca needs --tls-cert"
        return ""

    @property
    def endpoint_contradiction(self) -> str:
        """The same between other options and the endpoints.

        It does not matter before a service manager's sockets have replaced the endpoints.
        """
        has_tls = any(endpoint.transport == addresses.TLS for endpoint in self.endpoints)
        if has_tls and not self.tls_cert:
            return "an endpoint with TLS (tls://, or a passed socket named tls) needs --tls-cert"
        if self.tls_cert and not has_tls:
            return "--tls-cert is not used: add --bind tls://HOST:PORT, or pass a socket named tls"
        if all(each.transport == addresses.UNIX for each in self.endpoints):
            if self.proxy_from:
                return "--proxy-from is not used: socket files take no PROXY header"
            if self.max_clients_per_address:
                return "--max-clients-per-address is not used: clients of socket files have none"
        return ""

    @property
    def port_collision(self) -> str:
        """Why the ports cannot be bound together, as one line; "" if they can.

        It does not matter if a service manager hands over sockets: they are not bound here.
        """
        endpoints = self.endpoints
        for endpoint in endpoints:
            is_admin = endpoint.port == self.admin_port and endpoint.port > 0
            if is_admin and hosts_overlap(endpoint.host, self.admin_host):
                if self.bind:
                    return (
                        f"--bind {endpoint} and --admin-port {self.admin_port} overlap: change one"
                    )
                return (
                    f"--port and --admin-port are both {self.port}, on {self.host} and"
                    f" {self.admin_host}: choose another port for one of them"
                )
        for number, endpoint in enumerate(endpoints):
            for other in endpoints[:number]:
                if endpoint.overlaps(other):
                    return f"--bind {other} and --bind {endpoint} overlap: change one"
        return ""


OPTIONS: dict[str, Option] = {item.name: item.metadata["option"] for item in fields(Config)}


def flag(name: str) -> str:
    """Return the flag of a field: `line_timeout_seconds` gives `--line-timeout`."""
    return "--" + name.removesuffix("_seconds").replace("_", "-")


def environment_names(name: str) -> list[str]:
    """Return the environment variables of a field; the first that is set wins."""
    own = "GSERVER_" + flag(name).removeprefix("--").replace("-", "_").upper()
    return [own, RUNNER_VARIABLES[name]] if name in RUNNER_VARIABLES else [own]
