"""TLS 1.2 or newer: the server's context, and a client's connection, used like its bare socket.

OpenSSL is never given the socket: what it does in one call is bounded by the bytes of one read.
Given the socket, it reads on while a client sends KeyUpdates, for ten seconds and more.
"""

import _socket
import contextlib
import os
import re
import ssl
from calendar import timegm
from time import strptime
from typing import Any

from gserver.certificates import Certificates
from gserver.errors import UsageError

#: Data in a record, at most (RFC 8446, 5.1). The header ends with two bytes for the length.
RECORD_BYTES = 16_384
HEADER_BYTES = 5
MAX_RECORD_BYTES = HEADER_BYTES + RECORD_BYTES + 2048
#: The first byte of a TLS client (RFC 8446, 5.1).
HANDSHAKE_RECORD = b"\x16"
#: Limit on unread TLS output per client, such as answers to its KeyUpdates.
MAX_UNREAD_BYTES = 65_536
#: The validity of a certificate (RFC 5280, 4.1.2.5): two moments, each UTCTime or GeneralizedTime.
_VALIDITY = re.compile(
    rb"\x30[\x1e\x20\x22](?:\x17\x0d\d{12}|\x18\x0f\d{14})Z(?:\x17\x0d(\d{12})|\x18\x0f(\d{14}))Z"
)


def make_context(certificates: Certificates) -> ssl.SSLContext:
    """Return the server's context; raise `UsageError`, which names the option, for a bad file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
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
                    "--tls-cert is too weak for OpenSSL: use a longer key and SHA-256"
                ) from error
            raise UsageError(
                "--tls-cert must contain a certificate, and it or --tls-key the key, in PEM"
            ) from error
    if certificates.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cadata=certificates.client_ca)
        except (ssl.SSLError, ValueError) as error:
            raise UsageError("--tls-client-ca contains no certificate in PEM") from error
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
        "--tls-key is encrypted, and gserver cannot ask for its password: decrypt it (openssl pkey)"
    )


class IncompleteRecord(BlockingIOError):
    """Bytes have arrived, but no whole record."""


class TlsSocket:
    """A client's connection with TLS: receives, sends and closes like the socket under it.

    OpenSSL works on memory and is given whole records only, because it does not report a part of a
    record that it holds.
    """

    __slots__ = (
        "_has_ended",
        "_has_sent_close",
        "_incoming",
        "_outgoing",
        "_owed",
        "_part",
        "_sock",
        "_tls",
        "_unread",
        "_unsent",
        "fileno",
        "getpeername",
        "setsockopt",
    )

    def __init__(self, sock: _socket.socket, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        #: The beginning of a record whose rest has not arrived.
        self._part = b""
        #: Data that came with the end of the handshake. `recv` returns it first.
        self._unread = b""
        #: Encrypted bytes that the kernel has not taken, and how much of `send`'s data is in them.
        self._unsent, self._owed = b"", 0
        self._has_ended = self._has_sent_close = False
        self.fileno, self.setsockopt = sock.fileno, sock.setsockopt
        self.getpeername = sock.getpeername

    def handshake(self, received: bytes) -> bool:
        """Continue the handshake; return whether it is over. Raises `ssl.SSLError` if it fails.

        Then, and before there is more to receive, the client must be sent `outgoing`.
        """
        self._feed(received)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        self._unread, self._has_ended = self._decrypt()
        return True

    def outgoing(self) -> bytes:
        """Take what the handshake has to send."""
        return self._outgoing.read()

    @property
    def peer_certificate_name(self) -> str:
        """The common name in the client's certificate, or else its first other name; "" for none.

        Only a certificate that was verified counts.
        """
        certificate: dict[str, Any] = self._tls.getpeercert() or {}
        subject = [pair for names in certificate.get("subject", ()) for pair in names]
        names = [value for kind, value in subject if kind == "commonName"]
        names += [str(value) for _, value in certificate.get("subjectAltName", ())]
        return names[0] if names else ""

    @property
    def has_partial_record(self) -> bool:
        """Whether part of a record has arrived."""
        return bool(self._part)

    @property
    def has_unread(self) -> bool:
        """Whether `recv` has something to return although the socket is not readable."""
        return bool(self._unread) or self._has_ended

    def recv(self, size: int) -> bytes:
        """Return the data of the records that are whole; b"" at the client's end.

        Raises BlockingIOError if nothing has arrived, and IncompleteRecord if nothing whole has.
        """
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        if self._has_ended:
            return b""
        received = self._sock.recv(size)
        if not received or self._has_sent_close:
            # A TCP end without close_notify is a normal end: what the client has sent is answered.
            return received
        self._feed(received)
        data, self._has_ended = self._decrypt()
        if self._outgoing.pending:
            with contextlib.suppress(BlockingIOError):
                self._flush()
            if len(self._unsent) > MAX_UNREAD_BYTES:
                raise ConnectionAbortedError("the client does not read what TLS sends")
        if not data and not self._has_ended:
            raise IncompleteRecord
        return data

    def send(self, data: "bytes | memoryview") -> int:
        """Send some of it, and return how much.

        Raises BlockingIOError, and must then be called with the same data again. Raises
        SSLWantReadError for a client that has sent half a TLS message where it must be whole.
        """
        if not self._owed:
            self._owed = self._tls.write(data[:RECORD_BYTES])
        self._flush()
        sent, self._owed = self._owed, 0
        return sent

    def shutdown(self, how: int) -> None:
        """Send the end of TLS, then that of TCP."""
        self._send_close()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Send the end of TLS, unless that was done, and close."""
        self._send_close()
        self._sock.close()

    def _send_close(self) -> None:
        self._has_sent_close = True
        with contextlib.suppress(OSError):  # The connection is broken, or it was sent.
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            self._flush()

    def _feed(self, received: bytes) -> None:
        """Give OpenSSL the records that are whole by now."""
        data, end = self._part + received, 0
        while len(data) - end >= HEADER_BYTES:
            after = end + HEADER_BYTES + int.from_bytes(data[end + 3 : end + HEADER_BYTES])
            if after - end > MAX_RECORD_BYTES:
                after = len(data)  # It is no record: OpenSSL reports that.
            if after > len(data):
                break
            end = after
        self._part = data[end:]
        self._incoming.write(data[:end])

    def _decrypt(self) -> tuple[bytes, bool]:
        """Return the data of what was fed, and whether the client has sent its end."""
        parts: list[bytes] = []
        try:
            while True:
                part = self._tls.read(RECORD_BYTES)
                if not part:
                    return b"".join(parts), True
                parts.append(part)
                if not (self._incoming.pending or self._tls.pending()):
                    return b"".join(parts), False
        except ssl.SSLWantReadError:
            return b"".join(parts), False

    def _flush(self) -> None:
        """Send what is encrypted. Raises BlockingIOError if the kernel does not take all of it."""
        self._unsent += self._outgoing.read()
        if self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
            if self._unsent:
                raise BlockingIOError
