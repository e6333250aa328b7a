"""A callback protocol, the fastest that asyncio offers: `protocol.py PORT uvloop|asyncio [LINES]`.

LINES is how a line is parsed:

- `exact` (the default): only WHO, WHERE and WHY in capitals, without blanks, ended by LF.
- `any-spelling`: each line is stripped, upper-cased and looked up.
- `functions`: the same, and PING is a function that is called for each line.
"""

import asyncio
import importlib
import sys
import uuid
from collections.abc import Callable
from typing import ClassVar, cast

UNKNOWN = b"ERR unknown command\n"


class Service:
    """State that all clients share.

    The replies are ready to send. The reply to WHO is made again when the number changes.
    """

    def __init__(self) -> None:
        self.clients = 0
        self.commands = 0
        self.replies = {b"WHERE": b"%b\n" % str(uuid.uuid4()).encode(), b"WHY": b"42\n"}
        # Most reads contain exactly one line: one look-up, including its LF.
        self.whole = {line + b"\n": reply for line, reply in self.replies.items()}

    def count(self, change: int) -> None:
        """Add `change` to the number of clients."""
        self.clients += change
        self.replies[b"WHO"] = self.whole[b"WHO\n"] = b"%d\n" % self.clients


service = Service()


class Client(asyncio.Protocol):
    """One connection."""

    __slots__ = ("rest", "transport")
    transport: asyncio.Transport

    def __init__(self) -> None:
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the client."""
        self.transport = cast("asyncio.Transport", transport)
        service.count(1)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the interface)
        """Uncount the client."""
        service.count(-1)

    def data_received(self, data: bytes) -> None:
        """Answer all complete lines with one write."""
        if self.rest:
            data = self.rest + data
        reply = service.whole.get(data)
        if reply is not None:
            self.rest = b""
            service.commands += 1
            self.transport.write(reply)
            return
        *lines, self.rest = data.split(b"\n")
        if lines:
            replies = service.replies
            service.commands += len(lines)
            self.transport.write(b"".join([replies.get(line, UNKNOWN) for line in lines]))

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read."""
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on when the client has caught up."""
        self.transport.resume_reading()


class AnySpellingClient(Client):
    """A client that may send its commands in any case, with blanks around them, and with CRLF."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """Strip, upper-case and look up each complete line; answer with one write."""
        if self.rest:
            data = self.rest + data
        *lines, self.rest = data.split(b"\n")
        if lines:
            service.commands += len(lines)
            replies = service.replies
            self.transport.write(
                b"".join([replies.get(line.strip().upper(), UNKNOWN) for line in lines])
            )


def ping() -> str:
    """Answer PING, as the command in bench/own does."""
    return "PONG"


class FunctionsClient(Client):
    """The same with custom commands: functions that are called for each line."""

    __slots__ = ()
    functions: ClassVar[dict[bytes, Callable[[], str]]] = {b"PING": ping}

    def data_received(self, data: bytes) -> None:
        """Strip, upper-case and look up each complete line, and call its function."""
        if self.rest:
            data = self.rest + data
        *lines, self.rest = data.split(b"\n")
        if lines:
            service.commands += len(lines)
            self.transport.write(b"".join([self.reply(line.strip().upper()) for line in lines]))

    def reply(self, name: bytes) -> bytes:
        """The reply to one command."""
        function = self.functions.get(name)
        if function is not None:
            return b"%b\n" % function().encode("ascii")
        return service.replies.get(name, UNKNOWN)


CLIENTS = {"exact": Client, "any-spelling": AnySpellingClient, "functions": FunctionsClient}


async def main(port: int, lines: str = "exact") -> None:
    """Serve until the process is killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(CLIENTS[lines], "127.0.0.1", port, backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    importlib.import_module(sys.argv[2]).run(main(int(sys.argv[1]), *sys.argv[3:]))
