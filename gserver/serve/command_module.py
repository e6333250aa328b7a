"""Loads the module that `--commands` names and returns its commands."""

import importlib
import multiprocessing
import sys

from gserver.commands import BUILT_IN, Command
from gserver.errors import UsageError


def load_commands(module_name: str) -> tuple[Command, ...]:
    """Return the built-in commands and those of the named module; raise `UsageError` for a bad one."""
    if not module_name:
        return BUILT_IN
    # A forked child would hold our port and our clients, and go on with our event loop.
    multiprocessing.set_start_method("spawn", force=True)
    # The folder that gserver was started in, after everything installed: a file there must not hide
    # a package.
    sys.path.append("")
    try:
        module = importlib.import_module(module_name)
    # What somebody else's module may raise is unbounded, and all of it means the same here.
    except BaseException as error:
        raise UsageError(
            f"--commands {module_name}: cannot import it: {type(error).__name__}: {error}"
        ) from error
    added = {id(value): value for value in vars(module).values() if isinstance(value, Command)}
    own = tuple(value for value in added.values() if value not in BUILT_IN)
    if not own:
        raise UsageError(
            f"--commands {module_name}: it defines no command (decorate a function with @command)"
        )
    names = [item.name for item in (*BUILT_IN, *own)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--commands {module_name}: the command {name} is defined twice")
    return (*BUILT_IN, *own)
