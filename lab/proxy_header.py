"""PROXY headers: drawn at random, and judged by a second reading of the specification.

For tests and the fuzzer. It is slow, and reads whole headers only.
"""

import ipaddress
import re
import socket
from random import Random
from typing import NamedTuple

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
#: Lengths of the addresses of each family of version 2.
ADDRESS_BYTES = {0x00: 0, 0x11: 12, 0x12: 12, 0x21: 36, 0x22: 36, 0x31: 216, 0x32: 216}
PORT = "(0|[1-9][0-9]{0,4})"
LINE = re.compile(rf"PROXY (TCP4|TCP6) ([!-~]+) ([!-~]+) {PORT} {PORT}\r\n")
UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [^\n]*)?\r\n", re.S)


class Said(NamedTuple):
    """What a header says; `client` is None if the address is that of the connection."""

    size: int
    client: tuple[str, int] | None
    is_local: bool


def checksum(data: bytes) -> int:
    """CRC-32C, bit by bit."""
    register = 2**32 - 1
    for bit in (byte >> at & 1 for byte in data for at in range(8)):
        register = register >> 1 ^ (0x82F63B78 if (register ^ bit) & 1 else 0)
    return register ^ (2**32 - 1)


def judge(data: bytes) -> Said | None:
    """Return what the whole header at the beginning of `data` says; None if it is refused."""
    if data.startswith(SIGNATURE):
        return _judge_binary(data)
    end = data.find(b"\n") + 1
    line = data[:end]
    if not 0 < end <= 107:
        return None
    if UNKNOWN.fullmatch(line):
        return Said(end, None, is_local=False)
    found = LINE.fullmatch(line.decode("latin-1"))
    if not found or max(int(found[4]), int(found[5])) > 65535:
        return None
    family = socket.AF_INET if found[1] == "TCP4" else socket.AF_INET6
    try:
        packed = [socket.inet_pton(family, found[number]) for number in (2, 3)]
    except OSError:
        return None
    return Said(end, (_text(packed[0]), int(found[4])), is_local=False)


def may_go_on(data: bytes) -> bool:
    """Whether more bytes may complete the header at the beginning of `data`."""
    if data.startswith(SIGNATURE):
        return len(data) < 16 or len(data) < 16 + int.from_bytes(data[14:16])
    if data.startswith(b"PROXY "):
        return len(data) < 107 and b"\n" not in data
    return any(each.startswith(data) for each in (SIGNATURE, b"PROXY "))


def _text(packed: bytes) -> str:
    if packed[:12] == bytes(10) + b"\xff\xff":
        packed = packed[12:]
    return str(ipaddress.ip_address(packed))


def _judge_binary(data: bytes) -> Said | None:
    size = 16 + int.from_bytes(data[14:16])
    if not 16 <= size <= min(536, len(data)) or data[12] not in (0x20, 0x21):
        return None
    if data[12] == 0x20:
        return Said(size, None, is_local=True)
    if data[13] not in (0x11, 0x21):
        return Said(size, None, is_local=False) if data[13] in ADDRESS_BYTES else None
    length, width = ADDRESS_BYTES[data[13]], 4 if data[13] == 0x11 else 16
    if size < 16 + length or not _fields_are_right(data[:size], 16 + length):
        return None
    port = int.from_bytes(data[16 + 2 * width : 18 + 2 * width])
    return Said(size, (_text(data[16 : 16 + width]), port), is_local=False)


def _fields_are_right(header: bytes, at: int) -> bool:
    while at < len(header):
        length = int.from_bytes(header[at + 1 : at + 3])
        value = header[at + 3 : at + 3 + length]
        if len(header) < at + 3 or len(value) < length:
            return False
        if header[at] == 3:
            cleared = header[: at + 3] + bytes(length) + header[at + 3 + length :]
            if value != checksum(cleared).to_bytes(4):
                return False
        at += 3 + length
    return True


# Drawing


def line(*words: str | int) -> bytes:
    """Return a header of version 1: family, two addresses, two ports."""
    return f"PROXY {' '.join(map(str, words))}\r\n".encode()


def binary(
    command: int, family: int, addresses: bytes, *fields: tuple[int, bytes], has_crc: bool = False
) -> bytes:
    """Return a header of version 2. A checksum comes last."""
    rest = addresses + b"".join(
        bytes([kind]) + len(value).to_bytes(2) + value for kind, value in fields
    )
    if has_crc:
        rest += b"\x03\x00\x04" + bytes(4)
    header = SIGNATURE + bytes([command, family]) + len(rest).to_bytes(2) + rest
    return header[:-4] + checksum(header).to_bytes(4) if has_crc else header


def addresses(random: Random, family: int) -> bytes:
    """Return addresses and ports for a header of version 2."""
    if family >> 4 == 2 and random.random() < 0.3:
        return 2 * (bytes(10) + b"\xff\xff" + random.randbytes(4)) + random.randbytes(4)
    return random.randbytes(ADDRESS_BYTES.get(family, 12))


def draw(random: Random) -> bytes:
    """Return what a balancer, or somebody else, may send first: often nearly right."""
    data = _draw_line(random) if random.random() < 0.5 else _draw_binary(random)
    for _ in range(random.choice((0, 0, 1, 2))):
        at = random.randrange(len(data) + 1)
        change = random.randrange(3)
        inserted = random.choice((b" ", b"\r", b"\n", b"0", random.randbytes(1)))
        data = data[:at] + (inserted if change else b"") + data[at + (change != 1) :]
    return data + random.choice((b"", b"", b"WHO\n", data[:40]))


def _draw_line(random: Random) -> bytes:
    if random.random() < 0.2:
        return b"PROXY UNKNOWN" + random.choice((b"", b" x", b" " * 95, b"X")) + b"\r\n"
    family = random.choice(("TCP4", "TCP6", "TCP4", "TCP6", "UDP4"))
    hosts = [
        str(ipaddress.ip_address(random.randbytes(4 if family[3] == "4" else 16))) for _ in "ab"
    ]
    odd = ("::1", "1.2.3", "01.2.3.4", "::ffff:1.2.3.4", "fe80::1%1", "1.2.3.4/8")
    if random.random() < 0.2:
        hosts[random.randrange(2)] = random.choice(odd)
    return line(
        family,
        *hosts,
        random.choice((0, 1, 443, 65535, 65536, "01", "+1")),
        random.randrange(65536),
    )


def _draw_binary(random: Random) -> bytes:
    command = random.choice((0x20, 0x21, 0x21, 0x21, 0x21, 0x11, 0x22))
    family = random.choice((0x00, 0x11, 0x11, 0x21, 0x21, 0x12, 0x22, 0x31, 0x32, 0x10, 0x41))
    fields = [
        (random.choice((1, 2, 3, 4, 0xEA)), random.randbytes(random.choice((0, 3, 4, 150))))
        for _ in range(random.choice((0, 0, 1, 2, 4)))
    ]
    has_crc = random.random() < 0.3
    return binary(command, family, addresses(random, family), *fields, has_crc=has_crc)
