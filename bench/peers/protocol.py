"""A callback protocol, the fastest that asyncio offers: `protocol.py PORT uvloop|asyncio`."""

import asyncio
import importlib
import sys
import uuid
from typing import cast

UNKNOWN = b"ERR unknown command\n"


class Service:
    """What all clients share. The replies are ready to send; that of WHO is made anew when the
    number changes.
    """

    def __init__(self) -> None:
        self.clients = 0
        self.commands = 0
        self.replies = {b"WHERE": b"%b\n" % str(uuid.uuid4()).encode(), b"WHY": b"42\n"}
        # What comes is mostly one line: found whole, with its end.
        self.whole = {line + b"\n": reply for line, reply in self.replies.items()}

    def count(self, change: int) -> None:
        """A client has come or gone."""
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
        """Count it."""
        self.transport = cast("asyncio.Transport", transport)
        service.count(1)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no more."""
        service.count(-1)

    def data_received(self, data: bytes) -> None:
        """Answer all the lines that are whole by one write."""
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
        """A client that does not read is not read from."""
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """It has caught up."""
        self.transport.resume_reading()


async def main(port: int) -> None:
    """Serve for ever."""
    server = await asyncio.get_running_loop().create_server(Client, "127.0.0.1", port, backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    importlib.import_module(sys.argv[2]).run(main(int(sys.argv[1])))
