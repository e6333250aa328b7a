"""Every option of `serve`, named once: its default, its limits, its help and its environment names.

The command line, the documents and the tests derive from `Config`. Pure: reads no environment, no file.
A field's flag is its name with dashes, without the unit: `line_timeout_seconds` is `--line-timeout`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

LISTENING = "Listening"
CLIENTS = "Clients"
STOPPING = "Stopping"
EXTENDING = "Extending"
METRICS = "Metrics (StatsD)"
LOGS = "Logs"
LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "text")
#: Names that process runners give to the same things; GSERVER_<OPTION> wins over them.
RUNNER_VARIABLES = {"port": "PORT", "workers": "WEB_CONCURRENCY"}
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


def _option(default: Any, group: str, help: str, **rest: Any) -> Any:  # noqa: A002 (click's own word)
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


@dataclass(frozen=True, slots=True)
class Config:
    """One server's configuration. Periods are seconds; 0 switches off what its help says it does."""

    host: str = _option("127.0.0.1", LISTENING, "Address to listen on; 0.0.0.0 or :: for all.")
    port: int = _option(4242, LISTENING, "Port to listen on; 0 = any free one.", maximum=65535)
    backlog: int = _option(
        1024, LISTENING, "Connections that the kernel may hold before accept.", minimum=1, maximum=65535
    )
    workers: int = _option(
        1, LISTENING, "Worker processes, or auto: one for each core.", parse=parse_workers, metavar="N|auto"
    )
    server_id: str = _option(
        "", LISTENING, "What WHERE answers [default: a new UUID].", parse=parse_server_id, metavar="ID"
    )
    max_clients: int = _option(10000, CLIENTS, "Clients at once, over all workers.", minimum=1, maximum=10_000_000)
    max_line_bytes: int = _option(1024, CLIENTS, "Longest line, its ending not counted.", minimum=1, maximum=65536)
    line_timeout_seconds: float = _option(10.0, CLIENTS, "Time from a line's first byte to its end; 0 = no limit.")
    idle_timeout_seconds: float = _option(0.0, CLIENTS, "Time a client may say nothing; 0 = no limit.")
    write_timeout_seconds: float = _option(10.0, CLIENTS, "Time a client may leave its replies unread; 0 = no limit.")
    unterminated_after_seconds: float = _option(
        0.1, CLIENTS, "Silence after which a whole command without its newline is answered; 0 = never."
    )
    drain_timeout_seconds: float = _option(
        4.0, STOPPING, "Time from a stop to the exit, at most; what is busy then is cut off."
    )
    drain_delay_seconds: float = _option(
        0.0, STOPPING, "Time to go on serving after SIGTERM, before the drain, for balancers to notice."
    )
    hang_timeout_seconds: float = _option(
        10.0, STOPPING, "Time without a sign of life after which a process is replaced; 0 = never."
    )
    commands: str = _option("", EXTENDING, "Python module with commands of your own.", metavar="MODULE")
    statsd_host: str = _option("", METRICS, "StatsD daemon [default: none, no metrics are sent].")
    statsd_port: int = _option(8125, METRICS, "Its UDP port.", minimum=1, maximum=65535)
    statsd_prefix: str = _option("gserver", METRICS, "First part of every name.", parse=parse_statsd_prefix)
    log_level: str = _option("info", LOGS, "Least level to log.", choices=LEVELS)
    log_format: str = _option("auto", LOGS, "auto = text on a terminal, json elsewhere.", choices=FORMATS)

    @property
    def needs_agent(self) -> bool:
        """Whether there is anything for an agent to do."""
        return bool(self.statsd_host)


OPTIONS: dict[str, Option] = {item.name: item.metadata["option"] for item in fields(Config)}


def flag(name: str) -> str:
    """Return the flag of a field: `line_timeout_seconds` gives `--line-timeout`."""
    return "--" + name.removesuffix("_seconds").replace("_", "-")


def environment_names(name: str) -> list[str]:
    """Return the environment variables of a field, the one that wins first."""
    own = "GSERVER_" + flag(name).removeprefix("--").replace("-", "_").upper()
    return [own, RUNNER_VARIABLES[name]] if name in RUNNER_VARIABLES else [own]
