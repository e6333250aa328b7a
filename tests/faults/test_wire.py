"""Bad input: what a client may send, however much of it and however slowly."""

from collections.abc import Callable

from tests.faults.rows import Notes, row
from tests.faults.site import Site

Start = Callable[..., Site]


@row("Endless line")
def test_a_line_without_end_is_cut_off_and_costs_no_memory(start: Start, notes: Notes) -> None:
    site = start()
    with site.neighbours(), site.client() as client:
        told = b""
        sent = 0
        try:
            for _ in range(160):
                client.send(b"x" * 65536)
                sent += 65536
        except OSError:
            notes.happened(f"closed after {sent} bytes")
        else:
            notes.happened(f"{sent} bytes were sent")
        assert told in (b"", b"ERR line too long\n")
