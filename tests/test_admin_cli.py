"""The options of `gserver top` and `gserver status`."""

from gserver.cli.monitor import DEFAULT_ADMIN
from tests.running import gserver


def test_both_say_what_they_take_and_where_they_look() -> None:
    for command in ("top", "status"):
        done = gserver(command, "--help")
        assert done.returncode == 0
        assert f"[default: {DEFAULT_ADMIN}]" in " ".join(done.stdout.split())
        assert "--admin-token" in done.stdout


def test_a_bad_option_is_one_line_and_exit_code_2() -> None:
    for arguments in (("top", "--interval", "0"), ("status", "--once"), ("top", "x")):
        done = gserver(*arguments)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
