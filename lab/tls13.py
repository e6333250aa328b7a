"""A client that makes its own TLS 1.3 records (RFC 8446), to send what no library allows."""

import hashlib
import hmac
import ssl
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lab.running import Client
from lab.tls_client import run_handshake

#: Content types: 4, B.1.
HANDSHAKE, APPLICATION_DATA = 22, 23
#: A KeyUpdate message: 4.6.3. Its last byte requests an update from the other side.
KEY_UPDATE = b"\x18\x00\x00\x01"


class RecordClient(Client):
    """A client that uses the ssl module for the handshake, and makes all later records here."""

    def __init__(self, port: int, context: ssl.SSLContext, folder: Path) -> None:
        super().__init__(port)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.keylog_filename = str(folder / "keys")
        self._received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, sent, server_hostname="127.0.0.1")
        run_handshake(self, self._tls, self._received, sent)
        self.send(sent.read())
        lines = [line.split() for line in (folder / "keys").read_text().splitlines()]
        (secret,) = [line[2] for line in lines if line[0] == "CLIENT_TRAFFIC_SECRET_0"]
        cipher = self._tls.cipher()
        assert cipher
        assert "AES" in cipher[0]
        self._digest, self._key_bytes = (
            ("sha384", 32) if cipher[0].endswith("SHA384") else ("sha256", 16)
        )
        self._use(bytes.fromhex(secret))

    def record(self, content: bytes, kind: int = APPLICATION_DATA) -> bytes:
        """Return an encrypted record: 5.2."""
        plain = content + bytes([kind])
        header = b"\x17\x03\x03" + (len(plain) + 16).to_bytes(2, "big")
        nonce = (int.from_bytes(self._nonce, "big") ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        return header + AESGCM(self._key).encrypt(nonce, plain, header)

    def key_update(self, wants_one: bool = False) -> bytes:
        """Return a KeyUpdate record, and use the next keys from now on: 7.2."""
        record = self.record(KEY_UPDATE + bytes([wants_one]), HANDSHAKE)
        self._use(self._expand(b"traffic upd", hashlib.new(self._digest).digest_size))
        return record

    def line(self) -> bytes:
        """The next line with its LF; or the rest, if the connection ends first."""
        line = b""
        while not line.endswith(b"\n"):
            try:
                part = self._tls.read(1)
                if not part:
                    break
                line += part
            except ssl.SSLWantReadError:
                data = self.sock.recv(65536)
                if not data:
                    break
                self._received.write(data)
        return line

    def _use(self, secret: bytes) -> None:
        self._secret, self._sequence = secret, 0
        self._key, self._nonce = self._expand(b"key", self._key_bytes), self._expand(b"iv", 12)

    def _expand(self, label: bytes, size: int) -> bytes:
        """HKDF-Expand-Label with an empty context (7.1). One block is enough for these sizes."""
        name = b"tls13 " + label
        info = size.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0"
        return hmac.new(self._secret, info + b"\1", self._digest).digest()[:size]
