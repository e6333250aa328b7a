"""What is known of a client: little, since most clients are idle."""

import sys
from contextlib import closing
from socket import socket
from time import monotonic

from gserver.serve.connection import Connection


def test_a_client_that_has_come_has_not_spoken_and_is_quiet_from_then() -> None:
    before = monotonic()
    with closing(socket()) as sock:
        connection = Connection(sock, None)
        assert connection.sock is sock
    assert before <= connection.quiet_since <= monotonic()
    assert not connection.has_spoken
    assert not connection.is_overstayed


def test_it_takes_less_memory_than_a_greenlet_would_by_far() -> None:
    with closing(socket()) as sock:
        connection = Connection(sock, None)
    assert not hasattr(connection, "__dict__")
    assert sys.getsizeof(connection) + sys.getsizeof(connection.quiet_since) <= 128
