"""What `gserver check` prints: the options with their values and sources, and the commands."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import click

from gserver.cli.options import variable_in_use
from gserver.config import SECRETS, Config, environment_names, flag

#: Where an option without a value of its own comes from.
DEFAULT = "default"
#: Not used with `--bind`.
SHORT_FORM = "host", "port"


def describe(ctx: click.Context, config: Config, commands: Iterable[dict[str, Any]]) -> str:
    """Return two tables: the options, and the commands that clients can send."""
    options = [
        (flag(field.name), _shown(field.name, config), _source(ctx, field.name, config))
        for field in fields(Config)
        if not (config.bind and field.name in SHORT_FORM)
    ]
    rows = [(each["usage"], *_limits(each)) for each in commands]
    return "\n".join(
        [
            *_table([("option", "value", "from"), *options]),
            "",
            *_table([("command", "timeout", "at once in a worker"), *rows]),
            "",
            "A server would start with these options.",
        ]
    )


def _shown(name: str, config: Config) -> str:
    value = getattr(config.for_worker() if name == "redis_url" else config, name)
    if name == "admin_token" and value:
        return "(secret)"
    if name == "admin_port" and value < 0:
        return "off"
    return f"{value:g}" if isinstance(value, float) else str(value) or "-"


def _source(ctx: click.Context, name: str, config: Config) -> str:
    """Return the flag or the variable that has set an option, or why it has its value."""
    source = ctx.get_parameter_source(name)
    if source is click.core.ParameterSource.COMMANDLINE:
        return "flag"
    if source is click.core.ParameterSource.ENVIRONMENT:
        return variable_in_use(environment_names(name))
    if name in SECRETS and ctx.params[f"{name}_file"]:
        return flag(f"{name}_file")
    if name == "server_id":
        return "a new one at each start"
    if name == "max_clients" and config.max_clients < ctx.params[name]:
        return "default, lowered to the limit of open files"
    return DEFAULT


def _limits(command: dict[str, Any]) -> tuple[str, str]:
    if not command["may_block"]:
        return "-", "-"
    timeout, at_once = command["timeout"], command["at_once"]
    return f"{timeout:g} s" if timeout else "none", str(at_once or "no limit")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
