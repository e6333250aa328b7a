"""The command line: `gserver [serve] [OPTIONS]`, and the other commands.

Declares them and hands each to the module that does the work. Every mistake of the user
ends in `main` as one line on stderr and an exit code.
"""

import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from gserver import __version__, logs
from gserver.cli.options import (
    ClientOption,
    Command,
    ConfigCommand,
    Seconds,
    config_options,
    is_flag,
    read_secret,
    source_of,
    variable_in_use,
    warn_exposed,
    warn_unknown_variables,
)
from gserver.config import SECRETS, UPGRADE_VARIABLE, Config
from gserver.errors import EXIT_RUNTIME, FatalError, UsageError

if TYPE_CHECKING:
    from gserver.cli.admin_client import Target

DEFAULT_SERVER = "127.0.0.1:4242"
DEFAULT_ADMIN = "127.0.0.1:4243"
HELP_FLAGS = ("-h", "--help")


class _Group(click.Group):
    """A group whose default command is `serve`: `gserver -x` is `gserver serve -x`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_empty = not args and not ctx.resilient_parsing
        is_option_of_serve = (
            args and args[0].startswith("-") and args[0] not in (*HELP_FLAGS, "--version")
        )
        if is_empty or is_option_of_serve:
            args = ["serve", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        own = super().shell_complete(ctx, incomplete)
        if not incomplete.startswith("-"):
            return own
        return own + self.commands["serve"].shell_complete(ctx, incomplete)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        serve_command = self.commands["serve"]
        with click.Context(serve_command, parent=ctx) as serve_ctx:
            serve_ctx.help_option_names = []
            serve_command.format_options(serve_ctx, formatter)


@click.group(
    cls=_Group, context_settings={"max_content_width": 100, "help_option_names": list(HELP_FLAGS)}
)
@click.version_option(__version__, prog_name="gserver")
def gserver() -> None:
    """A small TCP service: a client sends a line with WHO, WHERE or WHY and receives one line.

    WHO is the number of connected clients, WHERE is the server's id, WHY is 42. Without a command,
    gserver runs `serve`.

    Each option of `serve` has an environment variable: --max-clients is GSERVER_MAX_CLIENTS. Some
    have a second one, shown as `env var`, which process runners set. A flag overrides a variable.
    """
    warn_unknown_variables(gserver.commands.values())


def _configuration(ctx: click.Context, options: dict[str, Any]) -> Config:
    """Return the configuration of a server. Raises `UsageError` if it cannot be served."""
    from gserver import boot

    options |= {name: read_secret(ctx, name) for name in SECRETS}
    config = Config(**{name: value for name, value in options.items() if value is not None})
    if config.log_format == "auto":
        config = replace(config, log_format="text" if sys.stdout.isatty() else "json")
    config = replace(
        config,
        workers=config.workers or len(os.sched_getaffinity(0)),
        server_id=config.server_id or str(uuid.uuid4()),
    )
    given = [name for name in ("host", "port") if is_flag(ctx, name)]
    if config.bind and given:
        raise UsageError(f"{source_of(ctx, 'bind')} and --{given[0]} are both set: set only one")
    _check(config)
    limit = boot.raise_file_limit()
    room = config.workers * boot.room_for_clients(config)
    is_default = ctx.get_parameter_source("max_clients") is click.core.ParameterSource.DEFAULT
    if config.max_clients > room and (not is_default or room < 1):
        raise UsageError(
            f"--max-clients {config.max_clients} is too high: {limit} open files per process allow"
            f" {room} clients. Raise the limit (ulimit -n), lower --max-clients or raise --workers."
        )
    return replace(config, max_clients=min(config.max_clients, room))


@gserver.command(cls=ConfigCommand, params=config_options())
@click.pass_context
def serve(ctx: click.Context, /, **options: Any) -> None:
    """Serve clients (the default command)."""
    from gserver.supervise import supervisor

    config = _configuration(ctx, options)
    # With --user, this process is another user from here.
    server = supervisor.Supervisor.start(config)
    try:
        _check_redis_ca(config)
        logs.start(config.log_level, config.log_format, config.server_id)
    except FatalError:
        server.close_endpoints()
        raise
    ctx.exit(server.run())


@gserver.command(cls=ConfigCommand, params=config_options())
@click.pass_context
def check(ctx: click.Context, /, **options: Any) -> None:
    """Say whether a server would start with these options, without starting it.

    Prints every option with its value and where the value comes from, and the commands. Takes the
    options of `serve`. Ports, Redis and StatsD are not tried. Exits with 0 if the server would
    start, with 2 if not.
    """
    from gserver.cli import check_report
    from gserver.supervise import rehearsal

    config = _configuration(ctx, options)
    try:
        commands = rehearsal.rehearse(config)
    except FatalError as error:
        raise UsageError(str(error)) from error
    _check_redis_ca(config)
    click.echo(check_report.describe(ctx, config, commands))


def _check_redis_ca(config: Config) -> None:
    if not config.redis_ca_file:
        return
    import ssl  # Loaded only if there is such a file.

    try:
        ssl.create_default_context(cafile=config.redis_ca_file)
    except OSError as error:  # ssl.SSLError included.
        raise UsageError(
            f"--redis-ca-file {config.redis_ca_file} cannot be used: name a file of certificates"
            " (PEM)"
        ) from error


def _resume() -> int:
    """Go on as the supervisor whose program this one replaces; return the exit code."""
    from gserver.supervise import supervisor, upgrade

    state = upgrade.read_state()
    config = state.config
    logs.start(config.log_level, config.log_format, config.server_id)
    return supervisor.Supervisor.resume(state).run()


def _check(config: Config) -> None:
    if config.contradiction:
        raise UsageError(config.contradiction)
    # Sockets that a service manager hands over (sd_listen_fds) may be other endpoints.
    is_handed_over = os.environ.get("LISTEN_PID") == str(os.getpid())
    problem = config.endpoint_contradiction or config.port_collision
    if problem and not is_handed_over:
        raise UsageError(problem)


@gserver.command(cls=Command, short_help="Send commands to a server and print the replies.")
@click.argument("commands", nargs=-1, metavar="[WHO|WHERE|WHY]...")
@click.option(
    "--server",
    "servers",
    cls=ClientOption,
    multiple=True,
    metavar="ADDRESS",
    envvar="GSERVER_SERVER",
    default=[DEFAULT_SERVER],
    show_default=True,
    help="Server to ask: HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT or unix:PATH; may be repeated"
    " (in the variable: separated by blanks).",
)
@click.option(
    "--timeout",
    "timeout_seconds",
    cls=ClientOption,
    type=Seconds(0.001),
    metavar="SECONDS",
    envvar="GSERVER_TIMEOUT",
    default=3.0,
    show_default=True,
    help="Time limit for each server.",
)
@click.option("--tls", is_flag=True, help="Use TLS; implied by the options below.")
@click.option(
    "--tls-ca",
    "ca",
    metavar="FILE",
    default="",
    help="CA (PEM) of the server's certificate [default: the system's].",
)
@click.option(
    "--tls-cert",
    "cert",
    metavar="FILE",
    default="",
    help="Client certificate (PEM); may contain the key.",
)
@click.option(
    "--tls-key",
    "key",
    metavar="FILE",
    default="",
    help="Private key of the client certificate (PEM).",
)
@click.option(
    "--tls-name",
    "name",
    metavar="NAME",
    default="",
    help="Name expected in the server's certificate [default: HOST].",
)
def ask(
    commands: tuple[str, ...],
    servers: tuple[str, ...],
    timeout_seconds: float,
    *,
    tls: bool,
    **tls_options: str,
) -> None:
    """Send commands to a server and print the replies; without a command, send WHO.

    Several servers are tried in turn until one replies to all commands. A server that does not
    answer is skipped, and so is one with an error of its own: too many clients, TLS only, idle, too
    slow, closed by the operator, cluster unavailable. Any other ERR line is a reply. Exits with 0
    only if every command got a reply that is not ERR; stderr names the others.
    """
    from gserver.cli.ask import TlsOptions, parse_server
    from gserver.cli.ask import ask as ask_servers

    if tls_options["key"] and not tls_options["cert"]:
        raise UsageError("--tls-key needs --tls-cert")
    answer = ask_servers(
        commands or ("WHO",),
        [parse_server(server) for server in servers],
        timeout_seconds,
        TlsOptions(**tls_options) if tls or any(tls_options.values()) else None,
    )
    for reply in answer.replies:
        click.echo(reply)
    if answer.failures:
        raise FatalError("; ".join(answer.failures))


def _admin_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that name the admin ports."""
    options = [
        click.option(
            "--admin",
            "urls",
            cls=ClientOption,
            multiple=True,
            metavar="HOST:PORT",
            envvar="GSERVER_ADMIN",
            default=[DEFAULT_ADMIN],
            show_default=True,
            help="Admin port to ask; may be repeated (in the variable: separated by blanks).",
        ),
        click.option(
            "--admin-token",
            cls=ClientOption,
            envvar="GSERVER_ADMIN_TOKEN",
            metavar="TEXT",
            help="Token that the servers require.",
        ),
        click.option(
            "--admin-token-file",
            cls=ClientOption,
            envvar="GSERVER_ADMIN_TOKEN_FILE",
            metavar="FILE",
            help="File that contains the token.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _targets(ctx: click.Context) -> "list[Target]":
    """Return the servers that the options of a command name."""
    from gserver.cli import admin_client

    targets = admin_client.parse_targets(ctx.params["urls"], read_secret(ctx, "admin_token") or "")
    if is_flag(ctx, "urls") and any("@" in url for url in ctx.params["urls"]):
        warn_exposed("admin_token", "--admin")
    return targets


@gserver.command(cls=Command, short_help="Show servers live, through their admin ports.")
@_admin_options
@click.option(
    "--interval",
    "interval_seconds",
    cls=ClientOption,
    type=Seconds(0.2, 3600),
    metavar="SECONDS",
    default=1.0,
    show_default=True,
    help="Time between two snapshots.",
)
@click.option("--once", "is_once", is_flag=True, help="Print one snapshot and exit.")
@click.option("--json", "is_json", is_flag=True, help="Print each snapshot as one line of JSON.")
@click.pass_context
def top(
    ctx: click.Context, /, interval_seconds: float, *, is_once: bool, is_json: bool, **_: Any
) -> None:
    """Show servers live, through their admin ports, until `q` or Ctrl-C.

    On a terminal this is a screen, otherwise one line per server and snapshot.
    """
    targets = _targets(ctx)
    from gserver.cli import top as screen

    if is_once:
        ctx.exit(screen.show_once(targets, interval_seconds, is_json=is_json))
    screen.show_live(targets, interval_seconds, is_json=is_json)


@gserver.command(cls=Command, short_help="Show the state of servers, through their admin ports.")
@_admin_options
@click.pass_context
def status(ctx: click.Context, /, **_: Any) -> None:
    """Show the state of servers, through their admin ports.

    Exits with 0 if all are healthy, otherwise with 1.
    """
    targets = _targets(ctx)
    from gserver.cli import top as screen

    ctx.exit(screen.show_status(targets))


@gserver.command(cls=Command, short_help="List the clients of servers, through their admin ports.")
@_admin_options
@click.option(
    "--sort",
    type=click.Choice(["age", "idle", "address", "state", "worker"]),
    default="age",
    show_default=True,
    help="What to sort by.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    default=100,
    show_default=True,
    help="Most clients to print.",
)
@click.option(
    "--json", "is_json", is_flag=True, help="Print all clients, as one line of JSON per server."
)
@click.pass_context
def clients(ctx: click.Context, /, sort: str, limit: int, *, is_json: bool, **_: Any) -> None:
    """List the clients of servers, through their admin ports.

    Also how many each address has, and the last that were rejected or closed for a reason.
    """
    targets = _targets(ctx)
    from gserver.cli import roster

    ctx.exit(roster.show(targets, sort, limit, is_json=is_json))


@gserver.command(cls=Command, short_help="Close clients of servers, through their admin ports.")
@click.argument("client", metavar="ID|ADDRESS")
@_admin_options
@click.pass_context
def kick(ctx: click.Context, /, client: str, **_: Any) -> None:
    """Close the client with this id, or all clients with this address (see `gserver clients`).

    They read `ERR closed by the operator`, unless a command of theirs runs or they do not read.
    Exits with 1 if there was none, or if a server or worker has not answered.
    """
    targets = _targets(ctx)
    from gserver.cli import roster

    ctx.exit(roster.kick(targets, client))


def main() -> None:
    """Run the command line. Errors become one line on stderr and an exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A locale may lack the arrows of `top`.
    try:
        if UPGRADE_VARIABLE in os.environ:
            code = _resume()
        else:
            code = gserver.main(prog_name="gserver", standalone_mode=False)
    except click.ClickException as error:
        _fail(_describe(error), error.exit_code)
    except FatalError as error:
        _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", EXIT_RUNTIME)
    except OSError as error:
        # The output cannot be written. Discard what is still buffered: it would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(str(error), EXIT_RUNTIME)
    sys.exit(code)


def _describe(error: click.ClickException) -> str:
    """Return the error as text, with the variable that the value came from and where to read on."""
    message, ctx = error.format_message(), getattr(error, "ctx", None)
    param = error.param if isinstance(error, click.BadParameter) else None
    if ctx and param and param.envvar:
        source = ctx.get_parameter_source(param.name or "")
        if source is click.core.ParameterSource.ENVIRONMENT:
            names = [param.envvar] if isinstance(param.envvar, str) else param.envvar
            message += f" (from {variable_in_use(names)})"
    return f"{message} (see {ctx.command_path if ctx else 'gserver'} --help)"


def _fail(message: str, code: int) -> None:
    click.echo("gserver: " + logs.printable(" ".join(message.split())), err=True)
    sys.exit(code)
