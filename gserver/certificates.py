"""The files of TLS, as text: read by the supervisor, at its start and at SIGHUP, and handed to
every worker.

So a worker that follows one that died has what was proven good, whatever the files hold by then;
and no worker has to be able to read a key.
"""

import os
import stat
from dataclasses import dataclass

from gserver.config import Config, flag
from gserver.errors import UsageError

MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Certificates:
    """In PEM; "" for what there is none of. The server's own comes first in `chain`, then those that lead to its CA."""

    chain: str = ""
    key: str = ""
    client_ca: str = ""


def read(config: Config) -> Certificates:
    """Read what the options name; raise `UsageError` for a file that cannot be read."""
    names = {
        "chain": "tls_cert",
        "key": "tls_key" if config.tls_key else "tls_cert",
        "client_ca": "tls_client_ca",
    }
    return Certificates(
        **{part: _read(name, getattr(config, name)) for part, name in names.items()}
    )


def _open(path: str, flags: int) -> int:
    return os.open(
        path, flags | os.O_NONBLOCK
    )  # Without it the opening of a pipe that nobody writes into never ends.


def _read(name: str, path: str) -> str:
    if not path:
        return ""
    try:
        # Comments may be in any letters, and OpenSSL wants what a client CA is given as to be
        # ASCII.
        with open(path, encoding="ascii", errors="ignore", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{flag(name)} {path} is no regular file")
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        hint = (
            f": let user {os.geteuid()} read it, too" if isinstance(error, PermissionError) else ""
        )
        raise UsageError(f"{flag(name)} {path} cannot be read: {error.strerror}{hint}") from error
    if (
        not text.strip() or len(text) > MAX_FILE_BYTES
    ):  # One that is being written anew is empty for a moment.
        raise UsageError(
            f"{flag(name)} {path} {'is too large' if text.strip() else 'is empty'}: name a file in PEM"
        )
    return text
