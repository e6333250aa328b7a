"""TLS, 1.2 or newer: what the certificates make of a context, and a client's connection, used like
its bare socket.

OpenSSL is never given the socket, so what it does in one go is bounded by the bytes that were
received in one: left alone, it reads on and on while a client sends KeyUpdates, for ten seconds and
more.
"""

import _socket
import contextlib
import os
import re
import socket
import ssl
from calendar import timegm
from time import strptime
from typing import Any

from gserver.certificates import Certificates
from gserver.errors import UsageError
from gserver.serve.connection import PartialRecord

#: What a record holds, at most (RFC 8446, 5.1); its header, the last two bytes of which are its
#: length; all of it.
RECORD_BYTES = 16_384
HEADER_BYTES = 5
MAX_RECORD_BYTES = HEADER_BYTES + RECORD_BYTES + 2048
#: What a client makes OpenSSL say (to its KeyUpdates, say) and does not read.
MAX_UNREAD_BYTES = 65_536
#: How a certificate says from when to when it holds (RFC 5280, 4.1.2.5): two UTCTime or
#: GeneralizedTime.
_VALIDITY = re.compile(
    rb"\x30[\x1e\x20\x22](?:\x17\x0d\d{12}|\x18\x0f\d{14})Z(?:\x17\x0d(\d{12})|\x18\x0f(\d{14}))Z"
)


def make_context(certificates: Certificates) -> ssl.SSLContext:
    """Return what clients are met with; raise `UsageError`, which names the option, for what cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # An end by TCP alone is an end: what such a client has asked is answered.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_IGNORE_UNEXPECTED_EOF
    with _file(certificates.chain) as chain, _file(certificates.key) as key:
        try:
            context.load_cert_chain(chain, key, password=_no_password)
        except ssl.SSLError as error:
            if "KEY_VALUES_MISMATCH" in str(error):
                raise UsageError(
                    "--tls-key is not the key of the certificate in --tls-cert"
                ) from error
            if "TOO_SMALL" in str(error) or "TOO_WEAK" in str(error):
                raise UsageError(
                    "--tls-cert is too weak for OpenSSL: have one with a longer key, and SHA-256"
                ) from error
            raise UsageError(
                "--tls-cert must hold a certificate, --tls-key or the same file its key, in PEM"
            ) from error
    if certificates.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cadata=certificates.client_ca)
        except (ssl.SSLError, ValueError) as error:
            raise UsageError("--tls-client-ca holds no certificate in PEM") from error
    return context


def expires_at(certificates: Certificates) -> int:
    """Return when the server's certificate expires, in Unix seconds; 0 if that cannot be read."""
    found = re.search(
        "-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", certificates.chain, re.S
    )
    validity = _VALIDITY.search(ssl.PEM_cert_to_DER_cert(found[0])) if found else None
    if not validity:
        return 0
    short, long = validity.groups()
    # Two digits stand for 1950 to 2049.
    digits = long or (b"19" if short >= b"5" else b"20") + short
    try:
        return timegm(strptime(digits.decode(), "%Y%m%d%H%M%S"))
    except ValueError:  # A month of 99, say: OpenSSL takes that for a certificate.
        return 0


@contextlib.contextmanager
def _file(text: str) -> Any:
    """The path of a file in memory: OpenSSL takes keys from files only."""
    fd = os.memfd_create("gserver-pem")
    try:
        os.write(fd, text.encode())
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _no_password() -> str:
    raise UsageError(
        "--tls-key is encrypted, and nobody is there to type its password: decrypt it (openssl pkey)"
    )


class TlsSocket:
    """A client's connection: receives, sends and closes like the bare non-blocking socket in it."""

    __slots__ = (
        "_has_said_end",
        "_incoming",
        "_outgoing",
        "_owed",
        "_part",
        "_sock",
        "_tls",
        "_unsent",
        "early",
        "fileno",
        "setsockopt",
    )

    def __init__(self, sock: _socket.socket, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        #: Of a record that has not arrived in whole.
        self._part = b""
        #: Encrypted, and not taken by the kernel yet; and how much of what `send` was given is in
        #: it.
        self._unsent, self._owed = b"", 0
        self._has_said_end = False
        #: What came with the end of the handshake, b"" for part of a record. `recv` returns it
        #: first: the event loop knows nothing of it.
        self.early: bytes | None = None
        self.fileno, self.setsockopt = sock.fileno, sock.setsockopt

    def shake_hands(self, received: bytes) -> bool:
        """Go on by what has been received; return whether that was all of it. Raises OSError when it has failed."""
        self._take(received)
        try:
            self._tls.do_handshake()
            early, _ = self._decrypted()
            self.early = early if early or self.has_part else None
        except ssl.SSLWantReadError:
            return False
        finally:
            self.flush()
        return True

    def flush(self) -> bool:
        """Send what is still to be sent of the handshake; return whether that was all of it."""
        with contextlib.suppress(BlockingIOError):
            self._flush()
        return not self._unsent

    def recv(self, size: int) -> bytes:
        """Return what has arrived in whole records. Raises BlockingIOError when that is nothing, or PartialRecord."""
        if self.early is not None:
            early, self.early = self.early, None
            return self._with_part(early)
        received = self._sock.recv(size)
        if not received or self._has_said_end:
            return received
        self._take(received)
        data, has_ended = self._decrypted()
        if self._outgoing.pending:
            with contextlib.suppress(BlockingIOError):
                self._flush()
            if len(self._unsent) > MAX_UNREAD_BYTES:
                raise ConnectionAbortedError("it does not read what TLS has to say")
        return data if has_ended else self._with_part(data)

    def _with_part(self, data: bytes) -> bytes:
        if self.has_part:
            raise PartialRecord(data)
        if not data:
            raise BlockingIOError
        return data

    @property
    def has_part(self) -> bool:
        """Whether a part of a record has arrived."""
        return bool(self._part)

    def send(self, data: "bytes | memoryview[int]") -> int:
        """Send some of it, and return how much. Raises BlockingIOError, and then wants the same
        data once more.

        A client that has said half a message of TLS where it has to be whole is as good as gone:
        SSLWantReadError.
        """
        if not self._owed:
            self._owed = self._tls.write(data[:RECORD_BYTES])
        self._flush()
        sent, self._owed = self._owed, 0
        return sent

    def shutdown(self, how: int) -> None:
        """Say by TLS that this was all, then by TCP."""
        self._say_end()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Say by TLS that this was all, if that was not said, and close."""
        self._say_end()
        self._sock.close()

    def _say_end(self) -> None:
        self._has_said_end = True
        with contextlib.suppress(OSError):  # It has gone; or it was said.
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            self._flush()

    def _take(self, received: bytes) -> None:
        """Give OpenSSL the records that are whole by now: of the others it would not say that it has a part."""
        data, end = self._part + received, 0
        while len(data) - end >= HEADER_BYTES:
            after = end + HEADER_BYTES + int.from_bytes(data[end + 3 : end + HEADER_BYTES])
            if after - end > MAX_RECORD_BYTES:
                after = len(data)  # It is no record: let OpenSSL say so.
            if after > len(data):
                break
            end = after
        self._part = data[end:]
        self._incoming.write(data[:end])

    def _decrypted(self) -> tuple[bytes, bool]:
        """Return what can be read of what was received, and whether the client has ended."""
        data = b""
        try:
            while True:
                part = self._tls.read(RECORD_BYTES)
                if not part:
                    with contextlib.suppress(OSError):
                        self._sock.shutdown(
                            socket.SHUT_RD
                        )  # So that the event loop reports it, until it is read.
                    return data, True
                data = data + part if data else part
                if not (self._incoming.pending or self._tls.pending()):
                    return data, False
        except ssl.SSLWantReadError:
            return data, False

    def _flush(self) -> None:
        self._unsent += self._outgoing.read()
        if self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
            if self._unsent:
                raise BlockingIOError
