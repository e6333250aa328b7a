"""TLS for the clients of one worker: 1.2 or newer. What comes of a handshake is used like a bare non-blocking socket.

A client whose handshake is not done is none yet: it is not counted, has a deadline of its own, and holds nobody up.
"""

import _socket
import contextlib
import logging
import os
import re
import socket
import ssl
from calendar import timegm
from collections.abc import Callable
from time import strptime
from typing import Any

import gevent
from gevent.lock import Semaphore
from gevent.socket import wait_read, wait_write
from gevent.ssl import SSLContext, SSLSocket

from gserver import logs
from gserver.certificates import Certificates
from gserver.conversation import DRAIN_GRACE_SECONDS, close_cleanly
from gserver.errors import Misuse
from gserver.protocol import PLAIN_TEXT, TLS_FAILED, Refusal

#: Handshakes under way in one worker, at most, and at most a quarter of its open files: for one more the oldest ends,
#: since an honest one takes milliseconds.
MAX_HANDSHAKES = 1024
#: What a client that speaks TLS begins with (RFC 8446, 5.1).
HANDSHAKE_RECORD = b"\x16"
#: How a certificate says from when to when it holds (RFC 5280, 4.1.2.5): two UTCTime or GeneralizedTime.
_VALIDITY = re.compile(rb"\x30[\x1e\x20\x22](?:\x17\x0d\d{12}|\x18\x0f\d{14})Z(?:\x17\x0d(\d{12})|\x18\x0f(\d{14}))Z")


def make_context(certificates: Certificates) -> ssl.SSLContext:
    """Return what clients are met with; raise `Misuse`, which names the option, for what cannot be used."""
    context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # An end by TCP alone is an end: what such a client has asked is answered.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_IGNORE_UNEXPECTED_EOF
    context.sslsocket_class = TlsSocket
    with _file(certificates.chain) as chain, _file(certificates.key) as key:
        try:
            context.load_cert_chain(chain, key, password=_no_password)
        except ssl.SSLError as error:
            if "KEY_VALUES_MISMATCH" in str(error):
                raise Misuse("--tls-key is not the key of the certificate in --tls-cert") from error
            raise Misuse("--tls-cert must hold a certificate, --tls-key or the same file its key, in PEM") from error
    if certificates.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cadata=certificates.client_ca)
        except (ssl.SSLError, ValueError) as error:
            raise Misuse("--tls-client-ca holds no certificate in PEM") from error
    return context


def expires_at(certificates: Certificates) -> int:
    """Return when the server's certificate expires, in Unix seconds; 0 if that cannot be read."""
    found = re.search("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", certificates.chain, re.S)
    validity = _VALIDITY.search(ssl.PEM_cert_to_DER_cert(found[0])) if found else None
    if not validity:
        return 0
    short, long = validity.groups()
    # Two digits stand for 1950 to 2049.
    digits = long or (b"19" if short >= b"5" else b"20") + short
    return timegm(strptime(digits.decode(), "%Y%m%d%H%M%S"))


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
    raise Misuse("--tls-key is encrypted, and nobody is there to type its password: decrypt it (openssl pkey)")


class TlsSocket(SSLSocket):
    """A client's, once it is non-blocking: receives, sends and closes as a bare socket does."""

    def recv(self, size: int = 0, _flags: int = 0) -> bytes:
        """Return what has arrived, whole records: of what is decrypted the event loop would not know."""
        try:
            data = super().recv(size)
            while more := self.pending():
                data += super().recv(more)
        except ssl.SSLWantReadError as error:
            raise BlockingIOError from error
        return data

    def shutdown(self, how: int) -> None:
        """Say by TLS that this was all, then by TCP."""
        self._say_end()
        super().shutdown(how)

    def close(self) -> None:
        """Say by TLS that this was all, if that was not said, and close."""
        self._say_end()
        super().close()

    def _say_end(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # It has gone; or it was said.
            self.unwrap()


class Handshakes:
    """Those under way. `on_done` is called with the socket of each that succeeds, `on_close` when one has ended."""

    def __init__(
        self,
        context: SSLContext,
        max_handshakes: int,
        timeout_seconds: float,
        refuse: Callable[[Refusal], None],
        on_done: Callable[[Any, Any], None],
        on_close: Callable[[], None],
    ) -> None:
        self._context = context
        self._max_handshakes = min(max_handshakes, MAX_HANDSHAKES)
        self._timeout_seconds = timeout_seconds or None
        self._refuse = refuse
        self._on_done = on_done
        self._on_close = on_close
        #: Each takes up to a millisecond of CPU: one has its turn, then everybody else.
        self._turn = Semaphore()
        #: By descriptor, the oldest first.
        self._under_way: dict[int, None] = {}

    @property
    def open(self) -> int:
        """How many there are."""
        return len(self._under_way)

    def begin(self, sock: _socket.socket, address: Any) -> None:
        """Begin one with a client that has connected."""
        if len(self._under_way) >= self._max_handshakes:
            oldest = next(iter(self._under_way))
            del self._under_way[oldest]
            _cut_off(oldest)
        self._under_way[sock.fileno()] = None
        gevent.spawn_raw(self._meet, sock, address)

    def drain(self) -> None:
        """Let those that are under way end soon."""
        gevent.spawn_later(DRAIN_GRACE_SECONDS, self._cut_off_all)

    def _cut_off_all(self) -> None:
        for fd in self._under_way:
            _cut_off(fd)

    def _meet(self, sock: _socket.socket, address: Any) -> None:
        """The greenlet of one."""
        fd, met = sock.fileno(), None
        try:
            with gevent.Timeout(self._timeout_seconds, TimeoutError("it took too long")):
                wait_read(fd)
                first = sock.recv(1, socket.MSG_PEEK)
                if first == HANDSHAKE_RECORD:
                    met = self._shake_hands(sock)
                elif first:
                    self._refuse(PLAIN_TEXT)
                    sock.send(PLAIN_TEXT.reply)
                    close_cleanly(sock)
        except OSError as error:
            self._refuse(TLS_FAILED)
            if logging.root.isEnabledFor(logging.DEBUG):
                fields = {"client.address": address[0], "client.port": address[1], **logs.error_fields(error)}
                logs.event(logging.DEBUG, "client.tls_failed", f"no TLS with {address[0]}: {error}", fields)
        finally:
            self._under_way.pop(fd, None)
            sock.close()
            if met is None:
                self._on_close()
            else:
                self._on_done(met, address)

    def _shake_hands(self, sock: _socket.socket) -> SSLSocket:
        met = self._context.wrap_socket(
            gevent.socket.socket(fileno=sock.detach()), server_side=True, do_handshake_on_connect=False
        )
        met.setblocking(False)
        try:
            while wait := self._go_on(met):
                wait(met.fileno())
        except ssl.SSLError:
            close_cleanly(met)  # It is told why, by an alert.
            raise
        except OSError:
            met.close()
            raise
        return met

    def _go_on(self, met: SSLSocket) -> Callable[[int], None] | None:
        """Take what has arrived; return what to wait by for more, None when it is done."""
        with self._turn:
            try:
                met.do_handshake()
            except ssl.SSLWantReadError:
                return wait_read
            except ssl.SSLWantWriteError:
                return wait_write
            finally:
                gevent.sleep(0)
        return None


def _cut_off(fd: int) -> None:
    sock = _socket.socket(fileno=fd)
    with contextlib.suppress(OSError):  # It has gone.
        sock.shutdown(socket.SHUT_RDWR)
    sock.detach()
