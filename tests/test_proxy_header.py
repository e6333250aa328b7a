"""The PROXY header: what balancers write, what is refused, and how much is read."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gserver.serve.proxy_header import ProxyHeader, ProxyHeaderError, crc32c, parse
from lab.proxy_header import SIGNATURE, binary, draw, judge, line, may_go_on

V4 = bytes([192, 0, 2, 7, 10, 0, 0, 1]) + (51234).to_bytes(2) + (4242).to_bytes(2)
V6 = bytes.fromhex("20010db8" + "00" * 11 + "07") + bytes(15) + b"\1" + b"\xc8\x22\x10\x92"
MAPPED = 2 * (bytes(10) + b"\xff\xff" + bytes([192, 0, 2, 7])) + b"\xc8\x22\x10\x92"
CLIENT_V4, CLIENT_V6 = ("192.0.2.7", 51234), ("2001:db8::7", 51234)

VALID: dict[bytes, tuple[tuple[str, int] | None, bool]] = {
    line("TCP4", "192.0.2.7", "10.0.0.1", 51234, 4242): (CLIENT_V4, False),
    line("TCP6", "2001:db8::7", "::1", 51234, 4242): (CLIENT_V6, False),
    line("TCP6", "2001:0DB8:0:0::0007", "::1", 51234, 0): (CLIENT_V6, False),
    line("TCP6", "::ffff:192.0.2.7", "::1", 51234, 1): (CLIENT_V4, False),
    b"PROXY UNKNOWN\r\n": (None, False),
    b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n": (None, False),
    b"PROXY UNKNOWN" + b" " * 92 + b"\r\n": (None, False),
    binary(0x21, 0x11, V4): (CLIENT_V4, False),
    binary(0x21, 0x21, V6): (CLIENT_V6, False),
    binary(0x21, 0x21, MAPPED): (CLIENT_V4, False),
    binary(0x21, 0x11, V4, (0x04, bytes(9)), (0x20, b"x" * 300)): (CLIENT_V4, False),
    binary(0x21, 0x11, V4, (0x05, b"id"), has_crc=True): (CLIENT_V4, False),
    binary(0x21, 0x11, V4, (0x04, bytes(505))): (CLIENT_V4, False),
    binary(0x21, 0x00, b""): (None, False),
    binary(0x21, 0x00, b"anything"): (None, False),
    binary(0x21, 0x12, V4): (None, False),
    binary(0x21, 0x31, bytes(216)): (None, False),
    binary(0x20, 0x00, b""): (None, True),
    binary(0x20, 0x11, V4): (None, True),
    binary(0x20, 0x00, b"skipped", has_crc=True): (None, True),
    binary(0x20, 0xFF, bytes(520)): (None, True),
    # The health check of a balancer of AWS: addresses of IPv4 are announced, and left out.
    SIGNATURE + bytes.fromhex("20110054030004bce5951f04004a") + bytes(74): (None, True),
}
REFUSED = {
    b"WHO\n": "no PROXY header",
    b"PROXI": "no PROXY header",
    b"proxy TCP4 192.0.2.7 10.0.0.1 1 2\r\n": "no PROXY header",
    b"\r\n\r\n\0\r\nQUIT\r": "no PROXY header",
    b"PROXY UNKNOWN\n": "CRLF",
    b"PROXY " + b"x" * 101: "CRLF within 107",
    b"PROXY UNKNOWN" + b" " * 93 + b"\r\n": "CRLF within 107",
    b"PROXY UNKNOWNX\r\n": "two addresses and two ports",
    b"PROXY TCP5 192.0.2.7 10.0.0.1 1 2\r\n": "two addresses and two ports",
    b"PROXY TCP4  192.0.2.7 10.0.0.1 1 2\r\n": "two addresses and two ports",
    b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2 \r\n": "two addresses and two ports",
    b"PROXY TCP4 192.0.2.7 10.0.0.1 1\r\n": "two addresses and two ports",
    b"PROXY TCP4 192.0.2.07 10.0.0.1 1 2\r\n": "address",
    b"PROXY TCP4 ::1 ::1 1 2\r\n": "address",
    b"PROXY TCP6 192.0.2.7 10.0.0.1 1 2\r\n": "address",
    b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n": "address",
    b"PROXY TCP6 ::1 \xff 1 2\r\n": "address",
    b"PROXY TCP4 192.0.2.7 10.0.0.1 65536 2\r\n": "port",
    b"PROXY TCP4 192.0.2.7 10.0.0.1 01 2\r\n": "port",
    b"PROXY TCP4 192.0.2.7 10.0.0.1 +1 2\r\n": "port",
    b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\r\n": "port",
    binary(0x11, 0x11, V4): "version or its command",
    binary(0x22, 0x11, V4): "version or its command",
    binary(0x21, 0x41, V4): "family",
    binary(0x21, 0x10, V4): "family",
    binary(0x21, 0x11, V4[:11]): "too short",
    binary(0x21, 0x21, V4): "too short",
    binary(0x21, 0x11, V4, (0x04, bytes(506))): "537 bytes",
    binary(0x20, 0x00, bytes(521)): "537 bytes",
    binary(0x21, 0x11, V4 + b"\4\0"): "cut",
    binary(0x21, 0x11, V4 + b"\4\0\2x"): "cut",
    binary(0x21, 0x11, V4, (0x03, bytes(4))): "checksum",
    binary(0x21, 0x11, V4, (0x03, b"")): "checksum",
}


@pytest.mark.parametrize("data", VALID)
def test_a_header_ends_where_it_ends_however_it_is_cut(data: bytes) -> None:
    client, is_local = VALID[data]
    expected = ProxyHeader(len(data), client, is_local)
    for rest in (b"", b"WHO\n", b"\x16\x03\x01", data):
        assert parse(data + rest) == expected
    for size in range(len(data)):
        assert parse(data[:size]) is None, f"{size} bytes are not enough"


@pytest.mark.parametrize("data", REFUSED)
def test_what_is_no_header_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(ProxyHeaderError, match=REFUSED[data]):
        parse(data)


def test_what_cannot_become_a_header_is_refused_at_once() -> None:
    for beginning in (b"W", b"PX", b"\r\n\r\n\0\r\nQUIX", SIGNATURE + b"\x31\x11\0\0", b"P\r\n"):
        with pytest.raises(ProxyHeaderError):
            parse(beginning)


def test_the_checksum_is_that_of_rfc_3720() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_no_changed_bit_of_the_addresses_or_the_checksum_passes() -> None:
    whole = binary(0x21, 0x11, V4, has_crc=True)
    fields = range(
        16 + len(V4), 16 + len(V4) + 3
    )  # Its type and length: without it, none is checked.
    for at in (at for at in range(13 * 8, len(whole) * 8) if at // 8 not in fields):
        changed = bytearray(whole)
        changed[at // 8] ^= 1 << at % 8
        header = None
        try:
            header = parse(bytes(changed))
        except ProxyHeaderError:
            continue
        assert header is None or header.client is None, f"bit {at}"


@given(st.integers(0, 2**32))
def test_it_agrees_with_a_second_reading_of_the_specification(seed: int) -> None:
    data = draw(Random(seed))
    said = judge(data)
    try:
        header = parse(data)
    except ProxyHeaderError:
        assert said is None
    else:
        assert (header and tuple(header)) == (said and tuple(said))
        assert header or may_go_on(data), "it waits for ever"
