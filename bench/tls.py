"""The cost of TLS: gserver with TLS, gserver behind a TLS proxy, and gserver without TLS.

A scenario of `bin/bench`. A proxy and its gserver share one core, and the figures are the sum of
both. All use the same key and certificate (ECDSA, P-256), and log no clients; the load generator
ensures the same version, group, cipher and handshakes.
"""

import atexit
import functools
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.measure import CLIENTS, SERVER_CORE, Sample, load, own_memory, tree, work
from bench.peers import HOST, Server, running, started
from lab.certificates import make_certificates
from lab.redises import free_port
from lab.tls_client import trust

PLAIN, OWN = "gserver without TLS", "gserver, `--tls-cert`"
#: Idle clients while memory is measured.
IDLE = 1000

HAPROXY = """
global
    nbthread 1
    maxconn 4000
defaults
    mode tcp
    timeout connect 5s
    timeout client 10m
    timeout server 10m
listen tls
    bind {host}:{port} ssl crt {pem}
    server gserver {host}:{behind}
"""
STUNNEL = """
foreground = yes
pid =
syslog = no
debug = warning
[tls]
accept = {host}:{port}
connect = {host}:{behind}
cert = {pem}
"""
#: For each proxy by its title: its command, which the configuration file follows, and the text of
#: that file.
PROXIES = {
    "HAProxy before gserver": (("haproxy", "-db", "-f"), HAPROXY),
    "stunnel before gserver": (("stunnel",), STUNNEL),
}
SERVICES = (PLAIN, OWN, *PROXIES)


def tls(seconds: float, service: str) -> Iterator[Sample]:
    """Hold idle clients, answer commands with one in flight, and accept short connections."""
    with serving(service) as server:
        with load(
            "hold", server, 10
        ) as first:  # The setup for the first clients is not part of their cost.
            first.expect("held 10")
        before = own_memory(tree(server))
        with load("hold", server, IDLE) as idle:
            idle.expect(f"held {IDLE}")
            time.sleep(0.5)
            yield {"clients": IDLE, "client_bytes": (own_memory(tree(server)) - before) / IDLE}
        for what, words in (
            ("command", ("pipeline", CLIENTS, 1)),
            ("connection", ("connect", CLIENTS)),
        ):
            worked = work(server, *words, seconds)
            yield {f"{what}_us": worked.pop("cpu_us"), **worked}


@contextmanager
def serving(service: str) -> Iterator[Server]:
    """Run one of SERVICES during the body; yield the server that clients connect to."""
    pem = _folder() / "both.pem"
    options = ("--tls-cert", str(pem)) if service == OWN else ()
    client = None if service == PLAIN else trust(_folder())
    with running(
        "gserver", cores=SERVER_CORE, options=options, tls=client if service == OWN else None
    ) as gserver:
        if service not in PROXIES:
            yield gserver
            return
        words, text = PROXIES[service]
        port = free_port()
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write(text.format(host=HOST, port=port, behind=gserver.port, pem=pem))
            file.flush()
            with started(
                words[0], [*words, file.name], port, cores=SERVER_CORE, tls=client
            ) as proxy:
                yield replace(proxy, pids=(*proxy.pids, *gserver.pids))


@functools.cache
def _folder() -> Path:
    """A folder with certificates; it is deleted when this process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_certificates(folder)
    both = (folder / "server.pem").read_text() + (folder / "server.key").read_text()
    (folder / "both.pem").write_text(both)
    return folder
