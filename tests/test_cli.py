"""The command line as a person types it, a container sets it and a shell completes it."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psutil
import pytest

from gserver import __version__
from gserver.cli import main as cli
from gserver.config import OPTIONS, Config, environment_names, flag
from lab.handover import listening, start
from lab.redises import free_port
from lab.running import GSERVER, LIMIT, Running, argv, environment, error_line, gserver

#: Every option: its variable, a text for it, and the parsed value.
EVERY_OPTION: dict[str, tuple[str, str, Any]] = {
    "host": ("GSERVER_HOST", "0.0.0.0", "0.0.0.0"),
    "port": ("GSERVER_PORT", "65535", 65535),
    "bind": ("GSERVER_BIND", "tcp://a:1  unix:/b", "tcp://a:1 unix:/b"),
    "backlog": ("GSERVER_BACKLOG", "7", 7),
    "workers": ("GSERVER_WORKERS", "auto", 0),
    "proxy_from": ("GSERVER_PROXY_FROM", "10.0.0.0/8, fd00::/8", "10.0.0.0/8,fd00::/8"),
    "proxy_header_timeout_seconds": ("GSERVER_PROXY_HEADER_TIMEOUT", "2.5", 2.5),
    "user": ("GSERVER_USER", "nobody:nogroup", "nobody:nogroup"),
    "server_id": ("GSERVER_SERVER_ID", "an-id", "an-id"),
    "max_clients": ("GSERVER_MAX_CLIENTS", "8", 8),
    "max_clients_per_address": ("GSERVER_MAX_CLIENTS_PER_ADDRESS", "7", 7),
    "max_line_bytes": ("GSERVER_MAX_LINE_BYTES", "65536", 65536),
    "line_timeout_seconds": ("GSERVER_LINE_TIMEOUT", "0", 0.0),
    "idle_timeout_seconds": ("GSERVER_IDLE_TIMEOUT", "1e3", 1000.0),
    "write_timeout_seconds": ("GSERVER_WRITE_TIMEOUT", "2.5", 2.5),
    "unterminated_after_seconds": ("GSERVER_UNTERMINATED_AFTER", "0.25", 0.25),
    "tls_cert": ("GSERVER_TLS_CERT", "c.pem", "c.pem"),
    "tls_key": ("GSERVER_TLS_KEY", "k.pem", "k.pem"),
    "tls_client_ca": ("GSERVER_TLS_CLIENT_CA", "ca.pem", "ca.pem"),
    "tls_handshake_timeout_seconds": ("GSERVER_TLS_HANDSHAKE_TIMEOUT", "2", 2.0),
    "drain_timeout_seconds": ("GSERVER_DRAIN_TIMEOUT", "3", 3.0),
    "drain_delay_seconds": ("GSERVER_DRAIN_DELAY", "1", 1.0),
    "drain_spread_seconds": ("GSERVER_DRAIN_SPREAD", "0.5", 0.5),
    "hang_timeout_seconds": ("GSERVER_HANG_TIMEOUT", "0", 0.0),
    "commands": ("GSERVER_COMMANDS", "my.module", "my.module"),
    "command_timeout_seconds": ("GSERVER_COMMAND_TIMEOUT", "2.5", 2.5),
    "command_at_once": ("GSERVER_COMMAND_AT_ONCE", "8", 8),
    "slow_command_seconds": ("GSERVER_SLOW_COMMAND", "0.5", 0.5),
    "redis_url": ("GSERVER_REDIS_URL", "redis://h:1/2", "redis://h:1/2"),
    "redis_url_file": ("GSERVER_REDIS_URL_FILE", "url.txt", "url.txt"),
    "redis_ca_file": ("GSERVER_REDIS_CA_FILE", "ca.pem", "ca.pem"),
    "redis_tls_verify": ("GSERVER_REDIS_TLS_VERIFY", "no", "no"),
    "cluster_name": ("GSERVER_CLUSTER_NAME", "east", "east"),
    "heartbeat_interval_seconds": ("GSERVER_HEARTBEAT_INTERVAL", "0.2", 0.2),
    "member_ttl_seconds": ("GSERVER_MEMBER_TTL", "9", 9.0),
    "on_cluster_loss": ("GSERVER_ON_CLUSTER_LOSS", "local", "local"),
    "cluster_max_age_seconds": ("GSERVER_CLUSTER_MAX_AGE", "7", 7.0),
    "statsd_host": ("GSERVER_STATSD_HOST", "localhost", "localhost"),
    "statsd_port": ("GSERVER_STATSD_PORT", "1", 1),
    "statsd_prefix": ("GSERVER_STATSD_PREFIX", "a:b", "a_b"),
    "admin_port": ("GSERVER_ADMIN_PORT", "9", 9),
    "admin_host": ("GSERVER_ADMIN_HOST", "localhost", "localhost"),
    "admin_token": ("GSERVER_ADMIN_TOKEN", "a-token", "a-token"),
    "admin_token_file": ("GSERVER_ADMIN_TOKEN_FILE", "token.txt", "token.txt"),
    "admin_url": ("GSERVER_ADMIN_URL", "http://h:1/", "http://h:1/"),
    "log_level": ("GSERVER_LOG_LEVEL", "debug", "debug"),
    "log_format": ("GSERVER_LOG_FORMAT", "text", "text"),
}

RUNNERS = {
    "port": "PORT",
    "workers": "WEB_CONCURRENCY",
    "redis_url": "REDIS_URL",
    "statsd_host": "STATSD_HOST",
    "statsd_port": "STATSD_PORT",
    "statsd_prefix": "STATSD_PREFIX",
}


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process's environment without the variables that configure gserver."""
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    return monkeypatch


def _parsed(*arguments: str) -> dict[str, Any]:
    """The arguments that `serve` would be called with."""
    return cli.serve.make_context("serve", list(arguments)).params


# Variables.


def test_every_option_is_in_the_table_of_this_file() -> None:
    assert list(EVERY_OPTION) == list(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_a_flag_and_a_variable_and_the_flag_wins(
    name: str, plain_environment: pytest.MonkeyPatch
) -> None:
    variable, text, value = EVERY_OPTION[name]
    default = getattr(Config(), name)
    assert _parsed()[name] == (None if default == "" else default)
    assert value != default
    assert _parsed(flag(name), text)[name] == value
    plain_environment.setenv(variable, text)
    assert _parsed()[name] == value
    plain_environment.setenv(variable, "another")
    assert _parsed(flag(name), text)[name] == value


@pytest.mark.parametrize("name", OPTIONS)
def test_an_empty_variable_counts_as_unset(
    name: str, plain_environment: pytest.MonkeyPatch
) -> None:
    unset = _parsed()[name]
    plain_environment.setenv(EVERY_OPTION[name][0], "")
    assert _parsed()[name] == unset
    if name in RUNNERS:
        plain_environment.setenv(RUNNERS[name], "")
        assert _parsed()[name] == unset
        plain_environment.setenv(RUNNERS[name], EVERY_OPTION[name][1])
        assert _parsed()[name] == EVERY_OPTION[name][2]


@pytest.mark.parametrize("name", RUNNERS)
def test_a_process_runners_variable_is_used_unless_gservers_own_is_set(
    name: str, plain_environment: pytest.MonkeyPatch
) -> None:
    variable, text, value = EVERY_OPTION[name]
    plain_environment.setenv(RUNNERS[name], text)
    assert _parsed()[name] == value
    plain_environment.setenv(RUNNERS[name], "!")
    plain_environment.setenv(variable, text)
    assert _parsed()[name] == value


@pytest.fixture(scope="module")
def taken() -> Iterator[list[int]]:
    """Three ports that are in use: a server that is configured to use one reports it and exits."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    yield [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()


def test_a_server_can_be_configured_by_its_environment_alone() -> None:
    env = {
        "PORT": "0",
        "GSERVER_PORT": "",
        "WEB_CONCURRENCY": "2",
        "GSERVER_SERVER_ID": "from-the-environment",
        "GSERVER_MAX_CLIENTS": "1",
        "GSERVER_LOG_LEVEL": "debug",
    }
    with Running(command=GSERVER, env=env) as server:
        started = server.wait_for("server.listening")
        assert (started["gserver.workers"], started["gserver.max_clients"]) == (2, 1)
        with server.client() as client:
            assert client.ask(b"WHERE") == b"from-the-environment"
            with server.client() as one_too_many:
                assert one_too_many.rest() == b"ERR too many clients\n"
        assert server.wait_for("client.accepted")["log.level"] == "debug"


# What runs.


@pytest.mark.outer
def test_a_command_line_with_only_options_serves() -> None:
    with Running(
        "--port", "0", "--workers", "auto", "--server-id", "Z-1.a", command=GSERVER
    ) as server:
        assert server.wait_for("server.listening")["gserver.workers"] == len(
            os.sched_getaffinity(0)
        )
        with server.client() as client:
            assert client.ask(b"WHERE") == b"Z-1.a"
        assert server.stop() == 0
        assert server.stderr == ""


@pytest.mark.outer
def test_each_server_without_an_id_gets_its_own(server: Running) -> None:
    with server.client() as client:
        first = client.ask(b"WHERE").decode()
    with Running() as other, other.client() as client:
        second = client.ask(b"WHERE").decode()
    assert {uuid.UUID(first).version, uuid.UUID(second).version} == {4}
    assert first != second


def test_the_version_is_that_of_the_package() -> None:
    done = gserver("--version")
    expected = (0, f"gserver, version {__version__}\n", "")
    assert (done.returncode, done.stdout, done.stderr) == expected


# Help.


def _sections(text: str) -> dict[str, str]:
    """The parts of a help text by their headings."""
    parts = re.split(r"^(\S[^\n]*):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "--help"), ("--port", "0", "--help")])
def test_the_help_shows_every_option_in_its_group(arguments: tuple[str, ...]) -> None:
    done = gserver(*arguments, COLUMNS="100")
    assert (done.returncode, done.stderr) == (0, "")
    sections = _sections(done.stdout)
    for name, option in OPTIONS.items():
        assert re.search(rf"^  {flag(name)} ", sections[option.group], re.MULTILINE), name
        first_words = " ".join(option.help.split()[:3])
        assert first_words in " ".join(sections[option.group].split()), name
    groups = [option.group for option in OPTIONS.values()]
    assert [heading for heading in sections if heading in groups] == list(dict.fromkeys(groups))


def test_the_top_level_help_lists_commands_and_the_help_of_serve_does_not() -> None:
    assert re.search(
        r"^  ask +.*^  serve +",
        _sections(gserver("--help").stdout)["Commands"],
        re.MULTILINE | re.DOTALL,
    )
    assert "Commands" not in _sections(gserver("serve", "--help").stdout)


def test_no_option_is_shown_twice() -> None:
    flags = re.findall(r"^  (?:-h, )?(--[a-z-]+)", gserver("--help").stdout, re.MULTILINE)
    assert sorted(flags) == sorted({"--help", "--version", *map(flag, OPTIONS)})


def test_the_help_shows_defaults_and_limits() -> None:
    text = " ".join(gserver("--help", COLUMNS="100").stdout.split())
    assert "[default: 1024; 5<=x<=65536]" in text
    assert "[default: 10]" in text
    assert "x>=0]" not in text
    assert "[default: 127.0.0.1]" in text
    assert "[default: a new UUID]" in text
    assert "[debug|info|warning|error]" in text


@pytest.mark.outer
@pytest.mark.parametrize("name", RUNNERS)
def test_the_help_of_an_option_names_the_variable_of_process_runners(name: str) -> None:
    text = " ".join(gserver("--help", COLUMNS="100").stdout.split())
    of_option = text.partition(f" {flag(name)} ")[2].partition(" --")[0]
    assert f"[env var: {RUNNERS[name]}" in of_option


@pytest.mark.outer
@pytest.mark.parametrize("words", [(), ("serve",), ("ask",), ("top",), ("status",)])
def test_h_is_short_for_help(words: tuple[str, ...]) -> None:
    short, long = gserver(*words, "-h"), gserver(*words, "--help")
    assert (short.returncode, short.stderr) == (0, "")
    assert short.stdout == long.stdout
    assert "-h, --help" in short.stdout


def test_the_help_of_ask_shows_its_options() -> None:
    done = gserver("ask", "--help")
    assert done.returncode == 0
    assert "[WHO|WHERE|WHY]..." in done.stdout
    for word in ("--server ADDRESS", "tls://HOST:PORT", "--timeout SECONDS", "127.0.0.1:4242"):
        assert word in done.stdout


# Choices.


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("--log-level", "INFO", "info"),
        ("--log-format", "Json", "json"),
        ("--on-cluster-loss", "LOCAL", "local"),
        ("--redis-tls-verify", "NO", "no"),
    ],
)
def test_a_choice_may_be_in_upper_case(option: str, text: str, value: str) -> None:
    name = next(name for name in OPTIONS if flag(name) == option)
    assert _parsed(option, text)[name] == value


# Mistakes.


def _bad_values() -> Iterator[tuple[str, str]]:
    """Each option with invalid texts, derived from its limits."""
    for name, option in OPTIONS.items():
        default = getattr(Config(), name)
        if isinstance(default, int | float) and not option.parse:
            yield from ((name, text) for text in ("", "many", "-1", "0x10"))
        if isinstance(default, int) and not option.parse:
            yield name, "1.5"
        if isinstance(default, float):
            yield from ((name, text) for text in ("nan", "inf", "-inf", "1e9"))
        if option.minimum:
            yield name, str(int(option.minimum) - 1)
        if option.maximum:
            yield name, str(int(option.maximum) + 1)
        if option.choices:
            yield from ((name, text) for text in ("", "loud"))
    yield from (("workers", text) for text in ("", "0", "257", "-1", "1.5", "nan", "all"))
    yield from (
        ("admin_url", text)
        for text in ("", "h:1", "ftp://h", "http://", "http://h:0", "http://a:b@h", "http://h:x")
    )
    yield from (("server_id", text) for text in ("", "two words", "caf\u00e9", "a\nb", "x" * 129))


@pytest.mark.outer
@pytest.mark.parametrize("name", sorted({name for name, _ in _bad_values()}))
def test_a_bad_value_is_reported_in_one_line_that_names_the_option(name: str) -> None:
    texts = [text for other, text in _bad_values() if other == name]
    runs = [
        subprocess.Popen(
            [*GSERVER, flag(name), text],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(PORT="0"),
        )
        for text in texts
    ]
    try:
        for text, run in zip(texts, runs, strict=True):
            stdout, stderr = run.communicate(timeout=LIMIT)
            said = error_line(subprocess.CompletedProcess(run.args, run.returncode, stdout, stderr))
            assert said.startswith(f"Invalid value for '{flag(name)}': "), text
            assert said.endswith(" (see gserver serve --help)"), text
    finally:
        for run in runs:
            run.terminate()  # If the value was accepted, a server runs.
            run.communicate(timeout=LIMIT)


@pytest.mark.outer
@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"PORT": "many"}, "PORT"),
        ({"GSERVER_PORT": "65536", "PORT": "1"}, "GSERVER_PORT"),
        ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY"),
        ({"GSERVER_WORKERS": "", "WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY"),
        ({"GSERVER_IDLE_TIMEOUT": "nan"}, "GSERVER_IDLE_TIMEOUT"),
        ({"GSERVER_SERVER_ID": "two words"}, "GSERVER_SERVER_ID"),
        ({"GSERVER_LOG_LEVEL": "loud"}, "GSERVER_LOG_LEVEL"),
    ],
)
def test_an_error_names_the_bad_variable(variables: dict[str, str], named: str) -> None:
    said = error_line(gserver(**variables))
    assert re.search(rf"\bfrom {named}\b", said), said


def test_an_error_of_a_client_command_names_the_bad_variable() -> None:
    said = error_line(gserver("ask", GSERVER_TIMEOUT="soon"))
    assert said.startswith("Invalid value for '--timeout': 'soon' ")
    assert said.endswith("(from GSERVER_TIMEOUT) (see gserver ask --help)")


def test_a_bad_flag_is_not_blamed_on_a_variable() -> None:
    assert "from" not in error_line(gserver("--port", "many", PORT="1", GSERVER_PORT="2"))


@pytest.mark.parametrize(
    ("typed", "meant"), [("serv", "serve"), ("srve", "serve"), ("aks", "ask"), ("asks", "ask")]
)
def test_a_mistyped_command_suggests_the_nearest_one(typed: str, meant: str) -> None:
    said = error_line(gserver(typed))
    assert said.startswith(f"No such command '{typed}'.")
    assert f"'{meant}'" in said


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--prot", "0"), "'--port'"),
        (("serve", "--worker", "2"), "'--workers'"),
        (("ask", "--sever", "127.0.0.1:1"), "'--server'"),
    ],
)
def test_a_mistyped_option_suggests_the_nearest_one(arguments: tuple[str, ...], word: str) -> None:
    said = error_line(gserver(*arguments))
    assert said.startswith("No such option ")
    assert word in said.partition(".")[2]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--commands", "a", "--commands", "b"), "--commands"),
        (("serve", "--port=0", "--workers", "1", "--port", "0"), "--port"),
        (("ask", "--timeout", "1", "--timeout", "1"), "--timeout"),
        (("ask", "--tls-ca", "a", "--tls-ca", "b"), "--tls-ca"),
        (("top", "--interval", "1", "--interval=2"), "--interval"),
        (("status", "--admin-token", "a", "--admin-token", "b"), "--admin-token"),
    ],
)
def test_an_option_with_one_value_is_refused_if_it_is_repeated(
    arguments: tuple[str, ...], option: str
) -> None:
    said = error_line(gserver(*arguments))
    assert said.startswith(f"Option '{option}' is given 2 times: it takes one value. (see gserver")


@pytest.mark.outer
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", "::"])
def test_one_port_for_clients_and_the_admin_port_is_refused(host: str) -> None:
    port = str(free_port())
    said = error_line(gserver("--host", host, "--port", port, "--admin-port", port))
    assert said == (
        f"--port and --admin-port are both {port}, on {host} and 127.0.0.1:"
        " choose another port for one of them"
    )


def test_the_port_option_is_ignored_if_a_socket_is_passed_in() -> None:
    port = str(free_port())
    with listening() as sock, start(sock, options=("--port", port, "--admin-port", port)) as server:
        assert server.wait_for("server.listening")["server.port"] == sock.getsockname()[1]


# Unknown variables.


def test_a_warning_about_an_unknown_variable_suggests_the_nearest_one() -> None:
    with Running(env={"GSERVER_MAX_CLINETS": "5", "GSERVER_QQQQQQ": "1"}) as server:
        assert server.who() == 1
        assert server.stop() == 0
    assert server.stderr.splitlines() == [
        "gserver: warning: the variable GSERVER_MAX_CLINETS is ignored: there is no such option"
        " (did you mean GSERVER_MAX_CLIENTS?)",
        "gserver: warning: the variable GSERVER_QQQQQQ is ignored: there is no such option",
    ]


def test_a_misspelt_variable_is_shown_with_the_error_that_it_causes(taken: list[int]) -> None:
    done = gserver("--port", str(taken[0]), GSERVER_PROT="0")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.endswith("(did you mean GSERVER_PORT?)")
    assert second.startswith("gserver: cannot listen on ")


def test_variables_of_other_commands_and_of_tests_are_known() -> None:
    others = {
        "GSERVER_SERVER": "127.0.0.1:1",
        "GSERVER_TIMEOUT": "1",
        "GSERVER_ADMIN": "127.0.0.1:1",
        "GSERVER_ADMIN_TOKEN_FILE": "",
        "GSERVER_UNSET": "",
        "GSERVER_TEST_PATIENCE": "3",
        "GSERVER_FUZZ_SEED": "1",
        "GSERVER_FAULT_SEED": "1",
        "GSERVER_HISTORY_SEED": "1",
    }
    with Running(env=others) as server:
        assert server.stop() == 0
        assert server.stderr == ""


def test_a_client_command_warns_about_an_unknown_variable_too() -> None:
    done = gserver("status", GSERVER_ADMN="127.0.0.1:1", GSERVER_ADMIN="127.0.0.1:1")
    assert done.stderr == (
        "gserver: warning: the variable GSERVER_ADMN is ignored: there is no such option"
        " (did you mean GSERVER_ADMIN?)\n"
    )


# Invalid command lines.


@pytest.mark.parametrize(
    "arguments",
    [
        ("--frob",),
        ("serve", "now"),
        ("4242",),
        ("--port",),
        ("serve", "--port"),
        ("-p", "1"),
        ("ask", "--timeout"),
    ],
)
def test_an_invalid_command_line_is_reported_in_one_line(arguments: tuple[str, ...]) -> None:
    assert error_line(gserver(*arguments)).endswith("--help)")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("serve", "now\nor never"), 2), (("--host", "no\n\x1b]0;such\a", "--port", "0"), 1)],
)
def test_control_characters_are_escaped_in_the_error_line(
    arguments: tuple[str, ...], code: int
) -> None:
    assert error_line(gserver(*arguments), code).isprintable()


def test_invalid_utf_8_is_reported_in_one_line() -> None:
    done = subprocess.run(
        [*(word.encode() for word in GSERVER), b"--server-id", b"\xff\n\x1b[31m"],
        capture_output=True,
        timeout=LIMIT,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(rb"gserver: [ -~]+\n", done.stderr)


def test_help_that_cannot_be_written_is_reported_in_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*GSERVER, "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
            env=environment(),
            check=False,
        )
    assert done.returncode == 1
    assert re.fullmatch(r"gserver: [^\n]*No space left on device[^\n]*\n", done.stderr)


def test_an_internal_error_is_logged_and_exits_with_1() -> None:
    code = (
        "import sys; from gserver.cli import main as cli\n"
        "from gserver.supervise import supervisor; sys.argv = ['gserver', '--port', '0']\n"
        "supervisor.Supervisor._watch = lambda self, now: 1 / 0\ncli.main()\n"
    )
    with Running(command=[sys.executable, "-P", "-c", code], wait=False) as server:
        assert server.exit_code() == 1
        assert server.events("process.error")[0]["error.type"] == "ZeroDivisionError"


# Shells and terminals.


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_completion_script(shell: str) -> None:
    done = gserver(_GSERVER_COMPLETE=f"{shell}_source")
    assert done.returncode == 0
    assert "_GSERVER_COMPLETE" in done.stdout
    assert f"{shell}_complete" in done.stdout


@pytest.mark.outer
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("gserver ", set(cli.gserver.commands)),
        ("gserver as", {"ask"}),
        ("gserver --po", {"--port"}),
        ("gserver --port 0 --log-l", {"--log-level"}),
        ("gserver serve --log-level ", {"debug", "info", "warning", "error"}),
        ("gserver ask --ser", {"--server"}),
    ],
)
def test_a_partial_command_line_is_completed(typed: str, expected: set[str]) -> None:
    words = typed.split(" ")
    done = gserver(
        _GSERVER_COMPLETE="bash_complete", COMP_WORDS=typed, COMP_CWORD=str(len(words) - 1)
    )
    assert done.returncode == 0
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected


def test_ctrl_c_ends_ask_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(LIMIT)
        asking = subprocess.Popen(
            [*GSERVER, *argv(f"ask --server 127.0.0.1:{mute.getsockname()[1]} --timeout {LIMIT}")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        sock, _ = mute.accept()
        with sock:
            select.select([sock], [], [], LIMIT)
            asking.send_signal(signal.SIGINT)
            stdout, stderr = asking.communicate(timeout=LIMIT)
    # The leading newline follows the ^C that a terminal shows.
    expected = (1, "", "gserver: interrupted\n")
    assert (asking.returncode, stdout, stderr.removeprefix("\n")) == expected


def test_every_option_of_serve_comes_from_the_configuration() -> None:
    options = [param.name for param in cli.serve.params if isinstance(param, click.Option)]
    assert options == list(OPTIONS)


def test_a_secret_that_http_cannot_carry_is_refused_and_not_shown() -> None:
    said = error_line(
        gserver("--admin-port", "0", "--port", "0", GSERVER_ADMIN_TOKEN="s\u00e9cret")
    )
    reason = "the token has characters that are not printable ASCII (from GSERVER_ADMIN_TOKEN)"
    assert reason in said
    assert "cret" not in said.replace("secret", "")


# Secrets.

TOKEN = "a-token-of-the-test"


@pytest.mark.outer
@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
@pytest.mark.parametrize("is_variable", [False, True])
def test_a_token_from_a_file_is_required_and_not_in_any_command_line(
    tmp_path: Path, ending: str, is_variable: bool
) -> None:
    file = tmp_path / "token"
    file.write_bytes(f"{TOKEN}{ending}".encode())
    options = [] if is_variable else ["--admin-token-file", str(file)]
    env = {"GSERVER_ADMIN_TOKEN_FILE": str(file)} if is_variable else {}
    with Running("--admin-port", "0", *options, env=env) as server:
        server.wait_for("agent.ready")
        admin = ["--admin", f"127.0.0.1:{server.admin_port()}"]
        assert gserver("status", *admin).returncode == 1
        done = gserver("status", *admin, *options, **env)
        assert (done.returncode, done.stderr) == (0, "")
        done = gserver("top", "--once", *admin, *options, **env)
        assert (done.returncode, done.stderr) == (0, "")
        processes = [psutil.Process(server.pid), *server.workers(), *server.agents()]
        assert len(processes) == 3
        assert TOKEN not in str([process.cmdline() for process in processes])
        assert server.stop() == 0
        assert server.stderr == ""


@pytest.mark.outer
@pytest.mark.parametrize("command", [("--admin-port", "0", "--port", "0"), ("status",), ("top",)])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty: it must contain the secret on one line"),
        (b"\n", "is empty: it must contain the secret on one line"),
        (b" \n", "is empty: it must contain the secret on one line"),
        (b"one\ntwo\n", "is longer than one line of at most 65536 bytes"),
        (b"one\n\n", "is longer than one line of at most 65536 bytes"),
        (b"\xff\n", "is not text in UTF-8"),
        (b"x" * 70_000, "is longer than one line of at most 65536 bytes"),
        ("caf\u00e9\n".encode(), ": the token has characters that are not printable ASCII"),
    ],
)
def test_a_file_that_does_not_hold_one_secret_is_refused_in_one_line(
    tmp_path: Path, command: tuple[str, ...], content: bytes | None, reason: str
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    said = error_line(gserver(*command, "--admin-token-file", str(file)))
    assert said.startswith(f"--admin-token-file {file}")
    assert reason in said


def test_an_invalid_url_in_a_file_is_refused_without_showing_its_secret(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("redis://:open-sesame@h:1,h:2")
    said = error_line(gserver("--port", "0", "--redis-url-file", str(file)))
    assert said.startswith(f"--redis-url-file {file}: the URL has several hosts")
    assert "open-sesame" not in said


def test_a_folder_or_an_empty_name_is_refused_as_a_secret_file(tmp_path: Path) -> None:
    for path, reason in (
        (str(tmp_path), f"{tmp_path} cannot be read: Is a directory"),
        ("", "needs the name of a file"),
    ):
        said = error_line(gserver("--port", "0", "--admin-token-file", path))
        assert said == f"--admin-token-file {reason}"


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (
            ("--admin-token", "a", "--admin-token-file", "b"),
            {},
            "--admin-token and --admin-token-file",
        ),
        (
            ("--admin-token-file", "b"),
            {"GSERVER_ADMIN_TOKEN": "a"},
            "GSERVER_ADMIN_TOKEN and --admin-token-file",
        ),
        (
            ("--redis-url", "redis://h"),
            {"GSERVER_REDIS_URL_FILE": "b"},
            "--redis-url and GSERVER_REDIS_URL_FILE",
        ),
        (("--redis-url-file", "b"), {"REDIS_URL": "redis://h"}, "REDIS_URL and --redis-url-file"),
        (
            ("status", "--admin-token", "a", "--admin-token-file", "b"),
            {},
            "--admin-token and --admin-token-file",
        ),
    ],
)
def test_a_secret_and_its_file_option_are_mutually_exclusive(
    arguments: tuple[str, ...], variables: dict[str, str], named: str
) -> None:
    assert error_line(gserver(*arguments, **variables)) == f"{named} are both set: set only one"


def _exposed(option: str, name: str) -> str:
    variable = environment_names(name)[0]
    return (
        f"gserver: warning: other users can read the secret in {option} (ps):"
        f" use --{name.replace('_', '-')}-file or the variable {variable}\n"
    )


@pytest.mark.outer
def test_a_secret_in_a_flag_is_warned_about_once_and_works() -> None:
    url = f"redis://:open-sesame@127.0.0.1:{free_port()}"
    options = ["--admin-port", "0", "--admin-token", TOKEN, "--redis-url", url]
    with Running(*options) as server:
        server.wait_for("agent.ready")
        admin = ["--admin", f"127.0.0.1:{server.admin_port()}"]
        done = gserver("top", "--once", *admin, "--admin-token", TOKEN)
        assert (done.returncode, done.stderr) == (0, _exposed("--admin-token", "admin_token"))
        done = gserver("top", "--once", "--admin", f"http://:{TOKEN}@{admin[1]}")
        assert (done.returncode, done.stderr) == (0, _exposed("--admin", "admin_token"))
        server.stop()
    assert server.stderr == _exposed("--redis-url", "redis_url") + _exposed(
        "--admin-token", "admin_token"
    )


@pytest.mark.outer
def test_a_url_without_a_password_or_in_a_variable_is_not_warned_about() -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    with Running(
        "--redis-url", url, "--admin-port", "0", env={"GSERVER_ADMIN_TOKEN": TOKEN}
    ) as server:
        server.wait_for("agent.ready")
        server.stop()
        assert server.stderr == ""
