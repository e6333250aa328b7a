"""Loads the module that `--commands` names.

Each new worker imports the module, so a reload (SIGHUP) runs its new code. Every problem with it is
a `UsageError`: the start fails, or the reload is given up and the old workers stay.
"""

import importlib
import importlib.util
import multiprocessing
import os
import sys
import traceback
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePath
from types import ModuleType

from gserver.commands import BUILT_IN, Command
from gserver.errors import UsageError
from gserver.logs import text_of


def load_commands(module_name: str) -> tuple[Command, ...]:
    """Return the built-in commands and those of the named module; the empty name is no module.

    Call it once in a process: it extends `sys.path`. Raises `UsageError` for a module that cannot
    be used.
    """
    if not module_name:
        return BUILT_IN
    _check_name(module_name)
    # A forked child would share this worker's port, clients and event loop.
    multiprocessing.set_start_method("spawn", force=True)
    # The folder that gserver was started in comes last: a file in it must not hide a package.
    sys.path.append("")
    own = _commands_of(_import(module_name))
    if not own:
        advice = 'defines no command: decorate a function with @command("NAME")'
        found = _location(sys.modules[module_name].__spec__)
        raise _unusable(module_name, _hidden_file(module_name) or f"{found} {advice}")
    _check_command_names(module_name, own)
    return (*BUILT_IN, *own)


def _unusable(module_name: str, reason: str) -> UsageError:
    return UsageError(f"--commands {module_name}: {reason}")


def _check_name(name: str) -> None:
    """Refuse a path and a relative name. Any other name may exist: Python decides."""
    if name.startswith(".") and "/" not in name:
        raise _unusable(name, "it must be the full name of a module, without a leading dot")
    if "/" in name or name.endswith(".py"):
        path = PurePath(name.removesuffix(".py"))
        advice = ".".join(path.parts)
        if path.is_absolute() or ".." in path.parts:
            advice = f"{path.name}, and start gserver in {path.parent}"
        reason = "it must be the name of a module, not a path"
        raise _unusable(name, f"{reason}: use --commands {advice}")


def _import(module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    # Code of others may raise anything, SystemExit and GreenletExit included. It must not end the
    # worker without a reason.
    except BaseException as error:
        text = " ".join(text_of(error).split())
        reason = f"cannot import it: {type(error).__name__}{text and ': ' + text}"
        if not isinstance(error, SyntaxError):  # Its text has the line.
            reason += _line_in(module_name, error)
        advice = _hidden_file(module_name)
        if not advice and _is_missing(module_name, error):
            advice = f"it is neither in {_start_folder()} nor installed"
        raise _unusable(module_name, f"{reason}{advice and ': ' + advice}") from error


def _line_in(module_name: str, error: BaseException) -> str:
    """Return the last line of the module that the error passed through, or nothing."""
    place = ""
    for frame, line_number in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == module_name:
            place = f" ({PurePath(frame.f_code.co_filename).name}, line {line_number})"
    return place


def _is_missing(module_name: str, error: BaseException) -> bool:
    """Whether the error means that the module, or a package around it, does not exist."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return False
    return f"{module_name}.".startswith(f"{error.name}.")


def _commands_of(module: ModuleType) -> list[Command]:
    """Return the commands in the module, each once, without built-in ones that it has imported."""
    found = [value for value in vars(module).values() if isinstance(value, Command)]
    return [item for item in dict.fromkeys(found) if item not in BUILT_IN]


def _check_command_names(module_name: str, own: list[Command]) -> None:
    built_in = {item.name for item in BUILT_IN}
    names: set[str] = set()
    for item in own:
        if item.name in built_in:
            reason = f"the command {item.name} is built in: choose another name"
            raise _unusable(module_name, reason)
        if item.name in names:
            raise _unusable(module_name, f"the command {item.name} is defined twice")
        names.add(item.name)


def _hidden_file(module_name: str) -> str:
    """Say which module is loaded instead of a file in the start folder; nothing if none is."""
    top_name = module_name.partition(".")[0]
    folder = Path(_start_folder())
    path = folder.joinpath(*module_name.split("."))
    own = next(
        (file for file in (path / "__init__.py", Path(f"{path}.py")) if file.is_file()), None
    )
    if own is None:
        return ""
    spec = None
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(top_name)
    if spec is None:
        return ""
    found = {spec.origin, *(spec.submodule_search_locations or ())}
    top = folder / top_name
    if found & {str(top), f"{top}.py", str(top / "__init__.py")}:
        return ""
    return f"{_location(spec)} is loaded instead of {own}: rename your file"


def _start_folder() -> str:
    """Return the current folder. Unlike `os.getcwd`, this works if it has been deleted."""
    return os.readlink("/proc/self/cwd")


def _location(spec: ModuleSpec | None) -> str:
    """Return where a module is, for an error message."""
    if spec is None:
        return "it"
    if spec.has_location:
        return str(spec.origin)
    if spec.submodule_search_locations:
        return f"the folder {next(iter(spec.submodule_search_locations))}"
    return f"Python's built-in module {spec.name}"
