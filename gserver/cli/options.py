"""Options on the command line: their types, help by group, secrets, unknown variables.

Knows nothing of the commands that use them.
"""

import contextlib
import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, cast

import click

from gserver import logs
from gserver.config import OPTIONS, Config, Option, environment_names, flag
from gserver.errors import UsageError
from gserver.redis_url import parse_urls

#: A file with a secret may be this large: a URL that names many Sentinels fits.
MAX_SECRET_BYTES = 65536
PREFIX = "GSERVER_"
#: Variables of tests, fuzzing and fault injection; they are not options.
TEST_VARIABLES = ("GSERVER_TEST_", "GSERVER_FUZZ_", "GSERVER_FAULT_", "GSERVER_HISTORY_")
_METAVARS = {int: "N", float: "SECONDS"}


class _Parsed(click.ParamType[Any]):
    """A click type made from an option's own `parse`."""

    name = "text"

    def __init__(self, parse: Callable[[str], Any]) -> None:
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Seconds(click.FloatRange):
    """A number of seconds, neither infinite nor NaN."""

    name = "number of seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; fail for any other text."""
        seconds = float(super().convert(value, param, ctx))
        if not seconds < 1e9:  # A range admits inf and NaN.
            self.fail(f"{value!r} is not a valid {self.name}.", param, ctx)
        return seconds


class ClientOption(click.Option):
    """An option whose help shows its variables and its default."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return what click shows in brackets.

        `show_envvar` would do more: errors would name the variable, even if a flag is wrong.
        """
        extra = super().get_help_extra(ctx)
        variables = self.shown_variables()
        if variables:
            extra["envvars"] = tuple(variables)
        if isinstance(self.default, float):
            extra["default"] = f"{self.default:g}"
        if extra.get("range", "").startswith("x>"):  # No time is negative.
            del extra["range"]
        return extra

    def shown_variables(self) -> list[str]:
        """Return the variables that the help shows."""
        return _variables(self)


class ConfigOption(ClientOption):
    """The option of a field of `Config`; its help shows only the variable of process runners."""

    def __init__(self, name: str, default: Any) -> None:
        option = OPTIONS[name]
        super().__init__(
            [flag(name), name],
            default=None if default == "" else option.shown_default or default,
            type=_click_type(option, default),
            metavar=option.metavar or _METAVARS.get(type(default)),
            help=option.help,
            envvar=environment_names(name),
            multiple=option.is_repeatable,
            show_default=default != "",
        )

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the value; the values of a repeatable option as one text."""
        found = super().process_value(ctx, value)
        if not self.multiple:
            return found
        return " ".join(found) if found else None

    def shown_variables(self) -> list[str]:
        """Return the second variable, if there is one; the first follows from the flag."""
        return environment_names(self.name or "")[1:]


def _click_type(option: Option, default: Any) -> click.ParamType[Any] | None:
    if option.choices:
        return click.Choice(option.choices, case_sensitive=False)
    if option.parse:
        return _Parsed(option.parse)
    if isinstance(default, int):
        whole = click.IntRange(
            cast("int | None", option.minimum), cast("int | None", option.maximum)
        )
        whole.name = "whole number"
        return whole
    if isinstance(default, float):
        return Seconds(option.minimum, option.maximum)
    return None


def config_options() -> list[click.Parameter]:
    """Return an option for each field of `Config`."""
    return [ConfigOption(item.name, item.default) for item in fields(Config)]


class Command(click.Command):
    """A command that refuses to be given an option twice if it takes one value.

    click would silently take the last one.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; raise `click.UsageError` if an option is repeated."""
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
            for param in dict.fromkeys(given):
                if _takes_one_value(param) and given.count(param) > 1:
                    raise click.UsageError(
                        f"Option '{param.opts[0]}' is given {given.count(param)} times:"
                        " it takes one value.",
                        ctx,
                    )
        return super().parse_args(ctx, args)


def _takes_one_value(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and not (param.multiple or param.is_flag or param.count)


class ConfigCommand(Command):
    """A command whose help shows its options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each group with a heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                option = OPTIONS.get(param.name or "")
                groups.setdefault(option.group if option else "Options", []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records, col_max=26)


def read_secret(ctx: click.Context, name: str) -> str | None:
    """Return the value of a secret option, from its flag, its variable or its file.

    The file is the value of the option `<name>_file`. Returns None if neither option is given.
    Raises `UsageError` if both are, or if the file does not hold one line that is a valid value.
    Warns of a secret in a flag: every user of the machine can read it.
    """
    value, path = ctx.params[name], ctx.params[f"{name}_file"]
    if path is None:
        if value and _is_secret(name, value) and is_flag(ctx, name):
            warn_exposed(name, flag(name))
        return cast("str | None", value)
    if value:
        both = f"{source_of(ctx, name)} and {source_of(ctx, f'{name}_file')}"
        raise UsageError(f"{both} are both set: set only one")
    line = _read_line(flag(f"{name}_file"), path)
    parse = OPTIONS[name].parse
    try:
        return str(parse(line)) if parse else line
    except ValueError as error:
        raise UsageError(f"{flag(f'{name}_file')} {path}: {error}") from error


def warn_exposed(name: str, option: str) -> None:
    """Warn of a secret in the flag `option`; the field `name` says what to use instead."""
    warn(
        f"other users can read the secret in {option} (ps):"
        f" use {flag(f'{name}_file')} or the variable {environment_names(name)[0]}"
    )


def _is_secret(name: str, value: str) -> bool:
    return name != "redis_url" or any(url.has_secret for url in parse_urls(value))


def is_flag(ctx: click.Context, name: str) -> bool:
    """Whether an option was given on the command line, not by its variable or its default."""
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def source_of(ctx: click.Context, name: str) -> str:
    """Return the flag of an option, or the variable that it was taken from."""
    return flag(name) if is_flag(ctx, name) else variable_in_use(environment_names(name))


def _read_line(option: str, path: str) -> str:
    if not path:
        raise UsageError(f"{option} needs the name of a file")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read: {error.strerror}") from error
    try:
        line = content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path} is not text in UTF-8") from error
    if not line.strip():
        raise UsageError(f"{option} {path} is empty: it must contain the secret on one line")
    if "\n" in line or "\r" in line or len(content) > MAX_SECRET_BYTES:
        raise UsageError(
            f"{option} {path} is longer than one line of at most {MAX_SECRET_BYTES} bytes:"
            " it must contain the secret and nothing else"
        )
    return line


def variable_in_use(names: Iterable[str]) -> str:
    """Return the first of these variables that is set."""
    return next(name for name in names if os.environ.get(name))


def warn_unknown_variables(commands: Iterable[click.Command]) -> None:
    """Warn of each GSERVER_ variable that no option of these commands has."""
    known = {name for command in commands for param in command.params for name in _variables(param)}
    # Without the prefix, which would make any two names similar.
    words = [name.removeprefix(PREFIX) for name in sorted(known) if name.startswith(PREFIX)]
    for name, value in sorted(os.environ.items()):
        is_ours = name.startswith(PREFIX) and not name.startswith(TEST_VARIABLES)
        if value and is_ours and name not in known:
            nearest = difflib.get_close_matches(name.removeprefix(PREFIX), words, n=1)
            hint = f" (did you mean {PREFIX}{nearest[0]}?)" if nearest else ""
            warn(f"the variable {name} is ignored: there is no such option{hint}")


def _variables(param: click.Parameter) -> list[str]:
    names = param.envvar or []
    return [names] if isinstance(names, str) else list(names)


def warn(message: str) -> None:
    """Print a warning on stderr. A stderr that cannot be written must not stop the program."""
    with contextlib.suppress(OSError):
        click.echo(f"gserver: warning: {logs.printable(message)}", err=True)
