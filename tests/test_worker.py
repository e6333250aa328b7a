"""The worker: clients are counted once in and once out, whatever becomes of them."""

from tests.running import Running


def test_who_counts_the_asker_and_the_others(server: Running) -> None:
    with server.client() as one, server.client() as two:
        assert one.who() == 2
        assert two.who() == 2
