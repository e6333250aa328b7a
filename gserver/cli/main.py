"""The command line: `gserver [serve] [OPTIONS]` and `gserver ask`.

Its options come from `gserver.config`. Everything a person can get wrong ends here as one line and
an exit code.
"""

import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast

import click
from click.shell_completion import CompletionItem

from gserver import __version__, logs
from gserver.cli import monitor
from gserver.config import OPTIONS, Config, Option, environment_names, flag
from gserver.errors import EXIT_RUNTIME, FatalError, UsageError
from gserver.redis_url import RedisUrl


class _Parsed(click.ParamType[Any]):
    """A click type made of an option's own `parse`."""

    name = "text"

    def __init__(self, parse: Callable[[str], Any]) -> None:
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _write_options(
    command: click.Command, ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None:
            option = OPTIONS.get(param.name or "")
            groups.setdefault(option.group if option else "Options", []).append(record)
    for group, records in groups.items():
        with formatter.section(group):
            formatter.write_dl(records, col_max=26)


class _Serve(click.Command):
    """The command whose help shows its options by group."""

    format_options = _write_options


class _Group(click.Group):
    """A group whose default command is `serve`: `gserver --port 80` is `gserver serve --port 80`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not (args or ctx.resilient_parsing) or (
            args and args[0].startswith("-") and args[0] not in ("--help", "--version")
        ):
            args = ["serve", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        own = super().shell_complete(ctx, incomplete)
        return (
            own + self.commands["serve"].shell_complete(ctx, incomplete)
            if incomplete.startswith("-")
            else own
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        serve_command = self.commands["serve"]
        with click.Context(serve_command, parent=ctx) as serve_ctx:
            serve_ctx.help_option_names = []
            _write_options(serve_command, serve_ctx, formatter)


@click.group(cls=_Group, context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="gserver")
def gserver() -> None:
    """A small TCP service: a client sends the line WHO, WHERE or WHY and gets a line back.

    WHO is the number of clients connected, WHERE the id of the server, WHY is 42. Without a
    command, `serve` runs, whose options have variables too: GSERVER_MAX_CLIENTS is --max-clients.
    """


def _click_type(option: Option, default: Any) -> click.ParamType[Any] | None:
    if option.choices:
        return click.Choice(option.choices)
    if option.parse:
        return _Parsed(option.parse)
    if isinstance(default, int):
        whole = click.IntRange(
            cast("int | None", option.minimum), cast("int | None", option.maximum)
        )
        whole.name = "whole number"
        return whole
    if isinstance(default, float):
        return _Seconds(option.minimum, option.maximum)
    return None


class _Seconds(click.FloatRange):
    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not seconds < 1e9:  # inf and nan pass a range
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds


def _option(name: str, default: Any) -> click.Option:
    option = OPTIONS[name]
    return click.Option(
        [flag(name), name],
        default=None if default == "" else option.shown_default or default,
        type=_click_type(option, default),
        metavar=option.metavar or ("N" if isinstance(default, int) else None),
        help=option.help,
        envvar=environment_names(name),
        show_default=default != "",
    )


@gserver.command(cls=_Serve, params=[_option(item.name, item.default) for item in fields(Config)])
@click.pass_context
def serve(ctx: click.Context, /, **options: Any) -> None:
    """Serve (what runs when no command is named)."""
    from gserver import boot
    from gserver.supervise import supervisor

    config = Config(**{name: value for name, value in options.items() if value is not None})
    _hide_secrets(ctx, config)
    if config.log_format == "auto":
        config = replace(config, log_format="text" if sys.stdout.isatty() else "json")
    config = replace(
        config,
        workers=config.workers or len(os.sched_getaffinity(0)),
        server_id=config.server_id or str(uuid.uuid4()),
    )
    if config.contradiction:
        raise UsageError(config.contradiction)
    limit = boot.raise_file_limit()
    room = config.workers * (limit - boot.RESERVED_FILES)
    is_chosen = ctx.get_parameter_source("max_clients") is not click.core.ParameterSource.DEFAULT
    if config.max_clients > room and (is_chosen or room < 1):
        raise UsageError(
            f"--max-clients {config.max_clients} does not fit: a process may open {limit} files, which leaves room"
            f" for {room} clients: raise the limit (ulimit -n), lower --max-clients or raise --workers"
        )
    config = replace(config, max_clients=min(config.max_clients, room))
    server = supervisor.Supervisor(config)  # From now on, this may be another user.
    if config.redis_ca_file and not os.access(config.redis_ca_file, os.R_OK):
        raise UsageError(
            f"--redis-ca-file {config.redis_ca_file} cannot be read: name a file of certificates (PEM)"
        )
    logs.start(config.log_level, config.log_format, config.server_id)
    ctx.exit(server.run())


def _hide_secrets(ctx: click.Context, config: Config) -> None:
    """Begin again with the secrets among the flags in the environment: arguments can be read by every user (ps)."""
    secrets = {"admin_token": config.admin_token}
    if RedisUrl.parse(config.redis_url or "redis://-").has_secret:
        secrets["redis_url"] = config.redis_url
    arguments, environment = list(sys.orig_argv), dict(os.environ)
    for name, value in secrets.items():
        if value and ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = flag(name)
            while option in arguments:
                del arguments[arguments.index(option) : arguments.index(option) + 2]
            arguments = [
                argument for argument in arguments if not argument.startswith(option + "=")
            ]
            environment[environment_names(name)[0]] = value
    if len(arguments) < len(sys.orig_argv):
        os.execve(sys.executable, arguments, environment)


@gserver.command()
@click.argument("commands", nargs=-1, metavar="[WHO|WHERE|WHY]...")
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="HOST:PORT",
    envvar="GSERVER_SERVER",
    default=["127.0.0.1:4242"],
    show_default=True,
    help="Server to ask; give several to have them tried in turn (in GSERVER_SERVER: separated by blanks).",
)
@click.option(
    "--timeout",
    "timeout_seconds",
    type=_Seconds(0.001),
    envvar="GSERVER_TIMEOUT",
    default=3.0,
    show_default=True,
    help="Time that each server has.",
)
@click.option("--tls", is_flag=True, help="By TLS; implied by the options below.")
@click.option(
    "--tls-ca",
    "ca",
    metavar="FILE",
    default="",
    help="CA (PEM) of its certificate [default: the system's].",
)
@click.option(
    "--tls-cert",
    "cert",
    metavar="FILE",
    default="",
    help="Certificate (PEM) to show, and its key if in one.",
)
@click.option("--tls-key", "key", metavar="FILE", default="", help="That key (PEM).")
@click.option(
    "--tls-name",
    "name",
    metavar="NAME",
    default="",
    help="Name in its certificate [default: HOST].",
)
def ask(
    commands: tuple[str, ...],
    servers: tuple[str, ...],
    timeout_seconds: float,
    *,
    tls: bool,
    **trust: str,
) -> None:
    """Ask a server and print its replies; WHO when no command is named.

    Exits with 1 when no server answers, or the answer is an ERR.
    """
    from gserver.cli.ask import Trust, parse_address
    from gserver.cli.ask import ask as ask_servers

    if trust["key"] and not trust["cert"]:
        raise UsageError("--tls-key is that of a certificate: give --tls-cert too")
    whom = Trust(**trust) if tls or any(trust.values()) else None
    addresses = [parse_address(server) for server in servers]
    for reply in ask_servers(commands or ("WHO",), addresses, timeout_seconds, whom):
        click.echo(reply)


gserver.add_command(monitor.top)
gserver.add_command(monitor.status)


def main() -> None:
    """Run the command line; tell a person about an error in one line."""
    try:
        code = gserver.main(prog_name="gserver", standalone_mode=False)
    except click.ClickException as error:
        _give_up(_describe(error), error.exit_code)
    except FatalError as failure:
        _give_up(str(failure), failure.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _give_up("interrupted", EXIT_RUNTIME)
    except OSError as error:
        # Output that cannot be written. What is still buffered goes nowhere, or it would fail again
        # at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _give_up(str(error), EXIT_RUNTIME)
    sys.exit(code)


def _describe(error: click.ClickException) -> str:
    """Say what is wrong, in which variable if it comes from one, and where to read on."""
    message, ctx = error.format_message(), getattr(error, "ctx", None)
    param = error.param if isinstance(error, click.BadParameter) else None
    if (
        ctx
        and param
        and ctx.get_parameter_source(param.name or "") is click.core.ParameterSource.ENVIRONMENT
    ):
        message += f" (from {next(name for name in param.envvar or () if os.environ.get(name))})"
    return f"{message} (see {ctx.command_path if ctx else 'gserver'} --help)"


def _give_up(message: str, code: int) -> None:
    click.echo("gserver: " + logs.printable(" ".join(message.split())), err=True)
    sys.exit(code)
