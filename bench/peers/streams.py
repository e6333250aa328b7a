"""asyncio's streams, a coroutine for each client: `streams.py PORT uvloop|asyncio`."""

import asyncio
import importlib
import sys
import uuid

UNKNOWN = b"ERR unknown command\n"


class Service:
    """State that all clients share.

    The replies are ready to send. The reply to WHO is made again when the number changes.
    """

    def __init__(self) -> None:
        self.clients = 0
        self.commands = 0
        self.replies = {b"WHERE\n": b"%b\n" % str(uuid.uuid4()).encode(), b"WHY\n": b"42\n"}

    def count(self, change: int) -> None:
        """Add `change` to the number of clients."""
        self.clients += change
        self.replies[b"WHO\n"] = b"%d\n" % self.clients

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client until it ends."""
        self.count(1)
        try:
            while line := await reader.readline():
                self.commands += 1
                writer.write(self.replies.get(line, UNKNOWN))
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.count(-1)
            writer.close()


async def main(port: int) -> None:
    """Serve until the process is killed."""
    server = await asyncio.start_server(Service().serve, "127.0.0.1", port, backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    importlib.import_module(sys.argv[2]).run(main(int(sys.argv[1])))
