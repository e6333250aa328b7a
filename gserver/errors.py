"""Errors that end the program with one line for people, and the exit codes that go with them.

Imports nothing, so that every module may raise these.
"""

EXIT_CLEAN = 0
EXIT_RUNTIME = 1
EXIT_USAGE = 2
#: Reported by a child that cannot read its instructions or the scoreboard.
OTHER_VERSION = (
    "the running supervisor has another version than the installed code: restart the server"
)


class FatalError(Exception):
    """gserver cannot go on. The text is one line: what is wrong and what to do."""

    exit_code = EXIT_RUNTIME


class UsageError(FatalError):
    """The request itself is wrong: a bad option, a bad command module."""

    exit_code = EXIT_USAGE


class DuplicateIdError(UsageError):
    """Another live server has the same id."""


class ClusterUnavailable(Exception):
    """The cluster's number of clients is too old to report (`--on-cluster-loss error`)."""
