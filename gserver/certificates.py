"""The TLS files, as text. The supervisor reads them at its start and at SIGHUP, for every worker.

So a worker that replaces a dead one has what is known to work, whatever the files contain by then,
and no worker needs permission to read the key.
"""

import os
import stat
from dataclasses import dataclass

from gserver.config import Config, flag
from gserver.errors import UsageError

MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Certificates:
    """In PEM; "" if there is none. `chain` has the server's own first, then those up to its CA."""

    chain: str = ""
    key: str = ""
    client_ca: str = ""


def read(config: Config) -> Certificates:
    """Read the files that the options name; raise `UsageError` for one that cannot be used."""
    return Certificates(
        chain=_read("tls_cert", config.tls_cert),
        key=_read("tls_key" if config.tls_key else "tls_cert", config.tls_key or config.tls_cert),
        client_ca=_read("tls_client_ca", config.tls_client_ca),
    )


def _open(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a pipe without a writer would block for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def _read(name: str, path: str) -> str:
    """Return the text of the file that an option names, "" for no path."""
    if not path:
        return ""
    try:
        # Comments may be in any script; OpenSSL wants a client CA in ASCII.
        with open(path, encoding="ascii", errors="ignore", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{flag(name)} {path} is not a regular file")
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        hint = ""
        if isinstance(error, PermissionError):
            hint = f": give user {os.geteuid()} permission to read it"
        raise UsageError(f"{flag(name)} {path} cannot be read: {error.strerror}{hint}") from error
    if not text.strip():  # A file that is being rewritten is empty for a moment.
        raise UsageError(f"{flag(name)} {path} is empty: name a file in PEM")
    if len(text) > MAX_FILE_BYTES:
        raise UsageError(f"{flag(name)} {path} is too large: name a file in PEM")
    return text
