"""Options and contexts for TLS, with the files of `make_certificates`."""

import ssl
from pathlib import Path

from lab.running import Client


def certified(pems: Path, name: str = "server") -> list[str]:
    """The options of a server with the certificate of that name."""
    return ["--tls-cert", str(pems / f"{name}.pem"), "--tls-key", str(pems / f"{name}.key")]


def trust(pems: Path, cert: str = "") -> ssl.SSLContext:
    """A client's context: it trusts the CA, and shows the certificate with this name, if any."""
    context = ssl.create_default_context(cafile=str(pems / "ca.pem"))
    if cert:
        context.load_cert_chain(pems / f"{cert}.pem", pems / f"{cert}.key")
    return context


def run_handshake(
    client: Client, inner: ssl.SSLObject, received: ssl.MemoryBIO, sent: ssl.MemoryBIO
) -> None:
    """Run the handshake of an in-memory TLS object over a plain client.

    Its last output stays in `sent`.
    """
    while True:
        try:
            return inner.do_handshake()
        except ssl.SSLWantReadError:
            client.send(sent.read())
            received.write(client.sock.recv(65536))
