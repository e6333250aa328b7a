"""How a worker hands its clients over to its successor in a reload, so that none is disconnected.

The supervisor gives each of the two one end of a socket pair. A message on it is one packet of
JSON. The successor begins with a greeting. Then the old worker sends its clients in batches, with
their descriptors beside them (SCM_RIGHTS), and the successor answers each batch. The successor
counts the clients before it answers, and the old worker takes them out of its count after that. So
WHO is too high by a batch for a moment, and never too low. Replies that clients have not read may
be large: they are passed as a file in memory, whose descriptor is the last one.

Until a batch is answered, it is the old worker's: if the successor dies, the old worker continues
to serve its clients. Bytes that arrive meanwhile stay in the kernel.
"""

import _socket
import json
import os
import socket
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from errno import ETOOMANYREFS
from itertools import islice
from time import monotonic
from typing import Any, BinaryIO

import gevent

from gserver.addresses import TLS
from gserver.commands import Command
from gserver.protocol import ERROR_REPLIES, INTERNAL, UNKNOWN_COMMAND, USAGE, ErrorReply, Parser
from gserver.serve.client import MOVING, Client, Work
from gserver.serve.limits import Limits
from gserver.serve.loop import Loop
from gserver.serve.proxied import ProxiedSocket

#: Version of the messages. To a successor with another one, no client is handed over.
FORMAT = 3
#: Clients in a batch. The kernel passes at most 253 descriptors with a message.
BATCH_CLIENTS = 250
#: A batch whose JSON has more bytes than this is sent. One client has 100 KB at most. The kernel's
#: usual limit for a packet is 208 KB.
BATCH_BYTES = 32_768
MAX_PACKET_BYTES = 262_144
#: So many bytes of unread replies count as one byte of JSON.
UNSENT_WEIGHT = 100
#: How long an old worker waits for the greeting.
GREETING_SECONDS = 5.0
#: How often an old worker looks for clients that can be handed over by now.
LOOK_SECONDS = 0.02
#: The same after the successor had too few descriptors.
RETRY_SECONDS = 0.1
#: Answers to a batch: the successor has all of it; or it had too few descriptors, and has nothing.
TAKEN, REFUSED = b"taken", b"refused"
#: The last message of an old worker.
END = b"end"


class HandoverError(Exception):
    """The handover cannot go on, so the old worker must. The text says why."""


class SuccessorDiedError(HandoverError):
    """The successor has closed its end of the pair. The supervisor knows why: there is no text."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a successor says first."""

    #: Its slot of the scoreboard.
    slot: int
    #: Descriptors that it has for clients.
    room: int
    format: int = FORMAT

    @classmethod
    def parse(cls, packet: bytes) -> "Greeting | None":
        """Return the greeting; None if it has another format."""
        fields = json.loads(packet)
        return cls(**fields) if fields.get("format") == FORMAT else None

    def encode(self) -> bytes:
        """Return it as a packet."""
        return json.dumps(asdict(self)).encode()


# One client as JSON.


def describe(client: Client, limits: Limits) -> dict[str, Any]:
    """Return all that a successor must know of a client, but for its unsent bytes.

    Times are monotonic seconds. The clock is that of the machine, so they mean the same in both
    workers.
    """
    fields: dict[str, Any] = {
        "spoken": client.has_spoken,
        "quiet_since": client.quiet_since,
        "address": client.address,
        "accepted_ns": client.loop.accepted_ns[client.sock.fileno()],
        "replies": client.loop.reply_counts.get(client),
        "places": limits.places(client.sock.fileno()),
    }
    if isinstance(client.sock, ProxiedSocket):
        fields["proxied"] = client.sock.getpeername()
    work = client.work
    if work and (work.is_pending or work.parser or work.unsent):
        fields["work"] = {
            "partial": _text(work.parser.partial) if work.parser else None,
            "line_deadline": work.line_deadline,
            "unread": _text(work.unread),
            "items": [_describe_item(item) for item in work.items],
            "unsent_bytes": len(work.unsent),
            "write_deadline": work.write_deadline,
            "closing_error": work.closing_error.name if work.closing_error else None,
            "has_input_ended": work.has_input_ended,
        }
    return fields


def restore(loop: Loop, fd: int, fields: dict[str, Any], unsent: BinaryIO) -> Client:
    """Return the client that these fields describe. Its unsent bytes are read from the file."""
    address, quiet_since = fields["address"], fields["quiet_since"]
    sock: Any = _socket.socket(fileno=fd)
    sock.setblocking(False)
    if peer := fields.get("proxied"):
        sock = ProxiedSocket(sock, tuple(peer))
    client = Client(loop, sock, tuple(address) if address else None, quiet_since)
    client.state = MOVING
    client.has_spoken = fields["spoken"]
    if fields["replies"] is not None:
        loop.reply_counts[client] = fields["replies"]
    if work := fields.get("work"):
        client.work = _restore_work(loop, client, work, unsent)
    return client


def _restore_work(loop: Loop, client: Client, fields: dict[str, Any], unsent: BinaryIO) -> Work:
    work, grammar = Work(), loop.replies.grammar
    work.line_deadline, work.write_deadline = fields["line_deadline"], fields["write_deadline"]
    work.unread, work.unsent = (
        _bytes(fields["unread"]),
        memoryview(unsent.read(fields["unsent_bytes"])),
    )
    work.items.extend(_restore_item(loop, *item) for item in fields["items"])
    if fields["partial"] is not None:
        work.parser = Parser(grammar, is_first=not (client.has_spoken or work.items))
        work.parser.partial = _bytes(fields["partial"])
    if fields["closing_error"]:
        work.closing_error = _error(fields["closing_error"])
    work.has_input_ended = fields["has_input_ended"]
    work.started_at = monotonic()
    return work


_ERRORS = {error.name: error for error in ERROR_REPLIES}


def _error(name: str) -> ErrorReply:
    """Return an error reply. Another version may have renamed it."""
    return _ERRORS.get(name, INTERNAL)


def _describe_item(item: Command | ErrorReply) -> tuple[str, list[str] | None, str]:
    """Return the name, the words of a command, and the reply line of an error."""
    if isinstance(item, Command):
        return item.name, list(item.words), ""
    return item.name, None, item.reply.decode()


def _restore_item(
    loop: Loop, name: str, words: list[str] | None, reply: str
) -> Command | ErrorReply:
    if words is None:
        error = _error(name)
        return error._replace(reply=reply.encode()) if error is USAGE else error
    # The new worker may not have this command any more, or it may take other words.
    command = loop.replies.grammar.commands.get(name.encode())
    return command.bind(words) if command else UNKNOWN_COMMAND


def _text(data: bytes) -> str:
    return b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return b64decode(text)


# The two sides.


class Sender:
    """The old worker's side."""

    def __init__(self, loop: Loop, pair: socket.socket) -> None:
        self._loop = loop
        self._pair = pair
        #: The successor's slot of the scoreboard.
        self.slot = -1
        self._is_given_up = False
        #: Clients that have been handed over.
        self.clients = 0

    def greet(self) -> bool:
        """Receive the greeting; return whether clients can be handed over to this successor.

        Raises `HandoverError` if it has died, or has too few descriptors.
        """
        try:
            greeting = Greeting.parse(self._receive(GREETING_SECONDS))
        except TimeoutError as error:
            raise HandoverError("the new worker does not begin") from error
        if not greeting:
            return False
        clients = self._movable_clients
        if greeting.room < clients:
            raise HandoverError(
                f"the new worker has descriptors for {greeting.room} clients, and {clients} are"
                " connected: raise the limit of open files (ulimit -n, prlimit)"
            )
        self.slot = greeting.slot
        self._loop.is_handing_over = True
        return True

    @property
    def _movable_clients(self) -> int:
        """How many clients can be handed over, now or later."""
        limits = self._loop.limits
        return limits.clients - limits.clients_by(TLS)

    def send_ready(self) -> None:
        """Hand over every client that is ready for it, batch by batch.

        Raises `HandoverError` if that cannot go on.
        """
        while not self._loop.is_draining and (batch := self._next_batch()):
            if not self._send(*batch):
                gevent.sleep(RETRY_SECONDS)
                return

    def wait(self, seconds: float) -> None:
        """Wait, or raise `SuccessorDiedError` as soon as the successor dies."""
        with suppress(TimeoutError):
            self._receive(seconds)

    def give_up(self) -> None:
        """Make pending receives fail: the successor is dead, though its end may still be open."""
        self._is_given_up = True
        with suppress(OSError):
            self._pair.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the handover. Clients that are parked stay with this worker."""
        with suppress(OSError):
            self._pair.send(END)
        self._pair.close()
        self._loop.is_handing_over = False
        parked, self._loop.parked = self._loop.parked, deque()
        self._loop.take_back(parked)

    def _next_batch(self) -> tuple[list[Client], list[str]] | None:
        """Return clients and their descriptions; None if no client is ready."""
        loop = self._loop
        if not self._movable_clients:  # Looking for one among many with TLS takes time.
            return None
        if not loop.parked:
            ready = (client for client in loop.clients.values() if client.may_move)
            for client in list(islice(ready, BATCH_CLIENTS)):
                loop.park(client)
        clients: list[Client] = []
        texts: list[str] = []
        size = 0
        while loop.parked and len(clients) < BATCH_CLIENTS and size <= BATCH_BYTES:
            client = loop.parked.popleft()
            clients.append(client)
            texts.append(json.dumps(describe(client, loop.limits)))
            size += len(texts[-1])
            if client.work:  # A file of many large replies would stop both workers for a while.
                size += len(client.work.unsent) // UNSENT_WEIGHT
        return (clients, texts) if clients else None

    def _send(self, clients: list[Client], texts: list[str]) -> bool:
        """Hand over a batch; return False if the successor, or the kernel, has refused it."""
        loop = self._loop
        packet = f"[{','.join(texts)}]".encode()
        fds = [client.sock.fileno() for client in clients]
        try:
            with self._noticing_death(), _unsent(clients) as file:
                socket.send_fds(self._pair, [packet], [*fds, file.fileno()])
            answer = self._receive(None)
        except (OSError, HandoverError) as error:
            loop.take_back(clients)
            if isinstance(error, HandoverError):
                raise
            if error.errno == ETOOMANYREFS:
                return False  # The user has too many descriptors on their way.
            raise HandoverError(f"a batch could not be sent: {error}") from error
        if answer != TAKEN:
            loop.take_back(clients)
            return False
        loop.limits.hand_over([client.transport for client in clients], self.slot)
        self.clients += len(clients)
        for client in clients:
            loop.release(client)
        return True

    @contextmanager
    def _noticing_death(self) -> Iterator[None]:
        """Raise `SuccessorDiedError` for an error that means that the successor is dead."""
        try:
            yield
        except OSError as error:
            if self._is_given_up or isinstance(error, BrokenPipeError | ConnectionResetError):
                raise SuccessorDiedError from error
            raise

    def _receive(self, wait_seconds: float | None) -> bytes:
        """Return the next packet. Raises TimeoutError, and `SuccessorDiedError` at the end."""
        self._pair.settimeout(wait_seconds)
        try:
            with self._noticing_death():
                packet = self._pair.recv(MAX_PACKET_BYTES)
        finally:
            self._pair.settimeout(None)
        if not packet:
            raise SuccessorDiedError
        return packet


def _unsent(clients: Iterable[Client]) -> BinaryIO:
    """Return a file in memory with what these clients have not read."""
    file = open(os.memfd_create("gserver-unsent"), "w+b")  # noqa: SIM115 - the caller closes it
    for client in clients:
        if client.work and client.work.unsent:
            file.write(client.work.unsent)
    file.seek(0)
    return file


def receive(loop: Loop, slot: int, pair: socket.socket) -> None:
    """Be the successor: take over clients until the old worker has ended, or until a drain."""
    limits, has_ended = loop.limits, False
    # Rejected clients have descriptors of their own.
    greeting = Greeting(slot, loop.capacity - (len(loop.clients) - loop.rejected))
    if loop.is_draining:
        pair.close()
        return
    with suppress(BrokenPipeError, ConnectionResetError), pair:
        pair.send(greeting.encode())
        while True:
            packet, fds, _, _ = socket.recv_fds(
                pair, MAX_PACKET_BYTES, BATCH_CLIENTS + 1, socket.MSG_CMSG_CLOEXEC
            )
            # In a drain, the old worker takes back what gets no answer: it may serve on.
            if packet in (b"", END) or loop.is_draining:
                has_ended = packet != b""
                _close_all(fds)
                break
            batch = json.loads(packet)
            if len(fds) <= len(batch):  # The kernel has passed those for which there was room.
                _close_all(fds)
                pair.send(REFUSED)
                continue
            with open(fds.pop(), "rb") as unsent:
                clients = [
                    restore(loop, fd, fields, unsent) for fd, fields in zip(fds, batch, strict=True)
                ]
            limits.take_over([client.transport for client in clients])
            for client, fields in zip(clients, batch, strict=True):
                limits.take_over_address(client.sock.fileno(), fields["places"])
            with suppress(BrokenPipeError):  # The old worker has died: its clients live on here.
                pair.send(TAKEN)
            for client, fields in zip(clients, batch, strict=True):
                loop.adopt(client, fields["accepted_ns"])
    limits.end_arrival(has_sender_died=not has_ended)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
