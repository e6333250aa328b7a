"""How a worker hands its clients over to its successor in a reload, so that none is disconnected.

The supervisor gives each of the two one end of a socket pair. A message on it is one packet of
JSON. The successor begins with a greeting. Then the old worker sends its clients in batches, with
their descriptors beside them (SCM_RIGHTS), and the successor answers each batch. The successor
counts the clients before it answers, and the old worker takes them out of its count after that. So
WHO is too high by a batch for a moment, and never too low. What has not been answered, and replies
that clients have not read, may be large: they are passed as a file in memory, whose descriptor is
the last one.

A silent client moves as it is. A conversation that waits is interrupted there, and gives back what
it has left; another one begins with that in the new worker. One that runs a handler follows later.

Until a batch is answered, it is the old worker's: if the successor dies, the old worker continues
to serve its clients. Bytes that arrive meanwhile stay in the kernel.
"""

import _socket
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from errno import ETOOMANYREFS
from itertools import islice
from typing import Any, BinaryIO

import gevent

from gserver.addresses import TLS
from gserver.protocol import ERROR_REPLIES, INTERNAL
from gserver.serve.client import Client, Rest
from gserver.serve.clients import Clients
from gserver.serve.conversation import Conversations
from gserver.serve.stream import Moved

#: Version of the messages. To a successor with another one, no client is handed over.
FORMAT = 4
#: Clients in a batch. The kernel passes at most 253 descriptors with a message.
BATCH_CLIENTS = 250
#: A batch whose file has more bytes than this is sent: larger ones would stop both workers.
BATCH_BYTES = 3_276_800
#: Limit on a batch without its file, and the kernel's on a packet is usually 208 KB.
MAX_PACKET_BYTES = 262_144
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


def describe(client: Client, rest: Rest, clients: Clients) -> dict[str, Any]:
    """Return all that a successor must know of a client, but for the bytes in the file.

    Times are monotonic seconds. The clock is that of the machine, so they mean the same in both
    workers.
    """
    return {
        "transport": client.transport,
        "spoken": client.has_spoken,
        "accepted_at": client.accepted_at,
        "quiet_since": client.quiet_since,
        "address": client.address,
        "replies": clients.reply_counts.get(client),
        "places": clients.limits.places(client.sock.fileno()),
        "unread": len(rest.unread),
        "unsent": len(rest.unsent),
        "line_ends": rest.line_ends,
        "write_ends": rest.write_ends,
        "error": rest.error.name if rest.error else None,
    }


def restore(clients: Clients, fd: int, fields: dict[str, Any], file: BinaryIO) -> Client:
    """Return the client that these fields describe, parked. Its bytes are read from the file."""
    address = tuple(fields["address"]) if fields["address"] else None
    sock = _socket.socket(fileno=fd)
    sock.setblocking(False)
    client = Client(sock, address, fields["transport"])
    client.accepted_at = fields["accepted_at"]
    client.has_spoken, client.quiet_since = fields["spoken"], fields["quiet_since"]
    client.is_counted = True
    if fields["replies"] is not None:
        clients.reply_counts[client] = fields["replies"]
    clients.parked[client] = Rest(
        unread=file.read(fields["unread"]),
        line_ends=fields["line_ends"],
        unsent=file.read(fields["unsent"]),
        write_ends=fields["write_ends"],
        # Another version may have renamed it.
        error=_ERRORS.get(fields["error"], INTERNAL) if fields["error"] else None,
    )
    return client


_ERRORS = {error.name: error for error in ERROR_REPLIES}


# The two sides.


class Sender:
    """The old worker's side."""

    def __init__(self, conversations: Conversations, pair: socket.socket) -> None:
        self._conversations = conversations
        self._clients = conversations.clients
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
        self._clients.is_handing_over = True
        return True

    @property
    def _movable_clients(self) -> int:
        """How many clients can be handed over, now or later."""
        limits = self._clients.limits
        return limits.clients - limits.clients_by(TLS)

    def send_ready(self) -> None:
        """Hand over every client that is ready for it, batch by batch.

        Raises `HandoverError` if that cannot go on.
        """
        while not self._clients.is_draining and (batch := self._next_batch()):
            if not self._send(batch):
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
        self._clients.is_handing_over = False
        self._conversations.take_back(list(self._clients.parked))

    def _next_batch(self) -> dict[Client, Rest]:
        """Return clients that are parked, with what is left to do for them."""
        clients = self._clients
        if not self._movable_clients:  # Looking for one among many with TLS takes time.
            return {}
        if not clients.parked:
            ready = (each for each in clients.by_fd.values() if clients.may_move(each))
            for client in list(islice(ready, BATCH_CLIENTS)):
                if client.stream:
                    client.stream.interrupt(Moved())
                else:
                    clients.park(client, Rest())
            gevent.sleep(0)  # The conversations end.
        batch: dict[Client, Rest] = {}
        size = 0
        for client, rest in islice(clients.parked.items(), BATCH_CLIENTS):
            batch[client] = rest
            size += len(rest.unread) + len(rest.unsent)
            if size > BATCH_BYTES:
                break
        return batch

    def _send(self, batch: dict[Client, Rest]) -> bool:
        """Hand over a batch; return False if the successor, or the kernel, has refused it."""
        clients = self._clients
        texts = [json.dumps(describe(*each, clients)) for each in batch.items()]
        fds = [client.sock.fileno() for client in batch]
        try:
            with self._noticing_death(), _bytes_of(batch.values()) as file:
                packet = f"[{','.join(texts)}]".encode()
                socket.send_fds(self._pair, [packet], [*fds, file.fileno()])
            answer = self._receive(None)
        except (OSError, HandoverError) as error:
            self._conversations.take_back(batch)
            if isinstance(error, HandoverError):
                raise
            if error.errno == ETOOMANYREFS:
                return False  # The user has too many descriptors on their way.
            raise HandoverError(f"a batch could not be sent: {error}") from error
        if answer != TAKEN:
            self._conversations.take_back(batch)
            return False
        clients.limits.hand_over([client.transport for client in batch], self.slot)
        self.clients += len(batch)
        for client in batch:
            del clients.parked[client]
            clients.forget(client)
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


def _bytes_of(rests: Iterable[Rest]) -> BinaryIO:
    """Return a file in memory with what was not answered, and what was not sent."""
    file = open(os.memfd_create("gserver-rests"), "w+b")  # noqa: SIM115 - the caller closes it
    for rest in rests:
        file.write(rest.unread)
        file.write(rest.unsent)
    file.seek(0)
    return file


def receive(conversations: Conversations, slot: int, pair: socket.socket) -> None:
    """Be the successor: take over clients until the old worker has ended, or until a drain."""
    ours, has_ended = conversations.clients, False
    limits = ours.limits
    # Rejected clients have descriptors of their own.
    greeting = Greeting(slot, ours.capacity - (ours.connections - len(ours.rejected)))
    if ours.is_draining:
        pair.close()
        return
    with suppress(BrokenPipeError, ConnectionResetError), pair:
        pair.send(greeting.encode())
        while True:
            packet, fds, _, _ = socket.recv_fds(
                pair, MAX_PACKET_BYTES, BATCH_CLIENTS + 1, socket.MSG_CMSG_CLOEXEC
            )
            # In a drain, the old worker takes back what gets no answer: it may serve on.
            if packet in (b"", END) or ours.is_draining:
                has_ended = packet != b""
                _close_all(fds)
                break
            batch = json.loads(packet)
            if len(fds) <= len(batch):  # The kernel has passed those for which there was room.
                _close_all(fds)
                pair.send(REFUSED)
                continue
            with open(fds.pop(), "rb") as file:
                clients = [
                    restore(ours, fd, fields, file) for fd, fields in zip(fds, batch, strict=True)
                ]
            limits.take_over([client.transport for client in clients])
            for client, fields in zip(clients, batch, strict=True):
                limits.take_over_address(client.sock.fileno(), fields["places"])
            with suppress(BrokenPipeError):  # The old worker has died: its clients live on here.
                pair.send(TAKEN)
            conversations.take_back(clients)
    limits.end_arrival(has_sender_died=not has_ended)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
