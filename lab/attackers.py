"""Bad clients: crowds and floods. Each runs in its own process and reports how much it did.

`python -m lab.attackers NAME PORT CA SECONDS NUMBER SOURCE`; CA is "" for plain.
"""

import socket
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice

from lab.child import Child, begun, report
from lab.running import Client
from lab.site import Site

#: Bad lines that are sent before the earlier replies have arrived.
UNDER_WAY = 8000


@dataclass
class Attack:
    """The parameters of an attacker."""

    port: int
    context: ssl.SSLContext | None
    seconds: float
    number: int
    source: str

    def connect(self) -> socket.socket:
        """Connect, over TLS if a CA is given."""
        return Client(self.port, source=self.source, context=self.context).sock

    def until_over(self, act: Callable[[], object]) -> None:
        """Repeat `act` until the time is over."""
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            act()


def bad_lines(attack: Attack) -> int:
    """Send invalid lines as fast as they are answered; return the number of replies."""
    sent = replies = 0
    with attack.connect() as sock:
        # One thread: until Python 3.13, two threads on one TLS connection corrupt it.
        while replies < attack.number:
            if sent < attack.number and sent - replies <= UNDER_WAY:
                sock.sendall(b"NO\n" * 1000)
                sent += 1000
            elif data := sock.recv(65536):
                replies += data.count(b"\n")
            else:
                break
    return replies


def connects(attack: Attack) -> int:
    """Connect, read to the end, and repeat; return the number of `too many clients` replies."""
    rejected = 0

    def connect() -> None:
        nonlocal rejected
        with suppress(OSError), attack.connect() as sock:
            rejected += sock.recv(100) == b"ERR too many clients\n"

    attack.until_over(connect)
    return rejected


def dribblers(attack: Attack) -> int:
    """Many clients send a byte twice a second; return the number of `too slow` replies."""
    socks = [attack.connect() for _ in range(attack.number)]
    begun()
    following = cycle(socks)

    def dribble() -> None:
        for sock in islice(following, attack.number // 250):
            with suppress(OSError):
                sock.send(b"x")
        time.sleep(0.008)

    attack.until_over(dribble)
    return sum(sock.recv(100) == b"ERR too slow\n" for sock in socks)


def crowd(attack: Attack) -> int:
    """Hold clients that have a reply; at the end of stdin, return how many get another."""
    socks = [attack.connect() for _ in range(attack.number)]

    def are_answered() -> int:
        for sock in socks:
            sock.send(b"WHY\n")
        return sum(sock.recv(100) == b"42\n" for sock in socks)

    assert are_answered() == attack.number
    begun()
    sys.stdin.read()
    return are_answered()


def silent(attack: Attack) -> int:
    """Connect silent clients, and reconnect closed ones. Return the number of connections."""
    attack.context = None
    socks = [attack.connect() for _ in range(attack.number)]
    begun()
    count = len(socks)

    def look() -> None:
        nonlocal count
        for index, sock in enumerate(socks):
            sock.setblocking(False)
            with suppress(BlockingIOError):
                sock.recv(100)
                sock.close()
                socks[index] = attack.connect()
                count += 1
        time.sleep(0.1)

    attack.until_over(look)
    return count


class Attacker(Child):
    """An attacker of a site."""

    def __init__(
        self, name: str, site: Site, seconds: float = 0, number: int = 0, source: str = "127.0.0.1"
    ) -> None:
        ca = site.pems / "ca.pem" if site.variant.is_tls else ""
        super().__init__("lab.attackers", name, site.server.port, ca, seconds, number, source)


def main() -> None:
    """Run an attack."""
    name, port, ca, seconds, number, source = sys.argv[1:]
    context = ssl.create_default_context(cafile=ca) if ca else None
    attack = Attack(int(port), context, float(seconds), int(number), source)
    if name in ("bad_lines", "connects"):
        begun()
    report(globals()[name](attack))


if __name__ == "__main__":
    main()
