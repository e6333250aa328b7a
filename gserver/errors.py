"""What a person is told when gserver cannot go on: one line, and the exit code that goes with it.

Imports nothing, so that every module may raise these.
"""

EXIT_CLEAN = 0
EXIT_RUNTIME = 1
EXIT_USAGE = 2


class FatalError(Exception):
    """Something outside the program is in the way. Its text is one line: what is wrong, what to do."""

    exit_code = EXIT_RUNTIME


class UsageError(FatalError):
    """The program was asked for something that it cannot do: a bad option, a bad module."""

    exit_code = EXIT_USAGE


class DuplicateIdError(UsageError):
    """Another live server has this one's id."""


class ClusterUnavailable(Exception):
    """The number of clients is not known well enough to be told (`--on-cluster-loss error`)."""
