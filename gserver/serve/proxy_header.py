"""The PROXY protocol header, with which a balancer tells the address of its client.

Pure: bytes in, a header or an error out. Versions 1 (a line of text) and 2 (binary) of HAProxy's
proxy-protocol.txt. It is strict, because the limits by address depend on it. The library
proxy-protocol is not: it accepts `UNKNOWNX`, ports like `+1_0`, and headers of any length.
"""

import re
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import NamedTuple

#: The longest header that is accepted, by version.
MAX_V1_BYTES, MAX_V2_BYTES = 107, 536
V1_BEGINNING = b"PROXY "
V2_BEGINNING = b"\r\n\r\n\0\r\nQUIT\n"
#: Version 2: signature, version and command, family and protocol, length of the rest.
_V2_HEAD = Struct("!12sBBH")
_LOCAL, _PROXY = 0x20, 0x21
_Ip = type[IPv4Address | IPv6Address]
#: Families whose addresses can be those of a client, and how they are written.
_V1_ADDRESSES: dict[bytes, _Ip] = {b"TCP4": IPv4Address, b"TCP6": IPv6Address}
_V2_ADDRESSES: dict[int, tuple[Struct, _Ip]] = {
    0x11: (Struct("!4s4sHH"), IPv4Address),
    0x21: (Struct("!16s16sHH"), IPv6Address),
}
#: No addresses, datagrams and Unix sockets: the balancer's own address is the client's.
_V2_WITHOUT_CLIENT = 0x00, 0x12, 0x22, 0x31, 0x32
_V1_PORT = re.compile(rb"0|[1-9][0-9]{0,4}")
_TLV_HEAD = Struct("!BH")
#: The type of the checksum (CRC-32C, Castagnoli), and its polynomial with the bits reversed.
_CRC_TYPE, _CRC_POLYNOMIAL = 0x03, 0x82F63B78


class ProxyHeaderError(ValueError):
    """The bytes are no valid header. The text says why, without repeating them."""


class ProxyHeader(NamedTuple):
    """A header: its length in bytes, and what it says."""

    size: int
    #: Address and port of the client; None if they are those of the connection.
    client: tuple[str, int] | None = None
    #: The balancer speaks for itself: it checks whether the server answers.
    is_local: bool = False


def parse(data: bytes) -> ProxyHeader | None:
    """Return the header that `data` begins with; None if it is not whole.

    Raises `ProxyHeaderError` if it is invalid, which may be known at its end only.
    """
    if data.startswith(V1_BEGINNING):
        return _parse_v1(data)
    if data.startswith(V2_BEGINNING):
        return _parse_v2(data)
    if V1_BEGINNING.startswith(data) or V2_BEGINNING.startswith(data):
        return None
    raise ProxyHeaderError("there is no PROXY header")


def _parse_v1(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\n", 0, MAX_V1_BYTES) + 1
    if not end and len(data) < MAX_V1_BYTES:
        return None
    if not data[:end].endswith(b"\r\n"):
        raise ProxyHeaderError(f"its line does not end with CRLF within {MAX_V1_BYTES} bytes")
    family, *words = data[len(V1_BEGINNING) : end - 2].split(b" ")
    if family == b"UNKNOWN":  # Whatever follows is ignored.
        return ProxyHeader(end)
    if family not in _V1_ADDRESSES or len(words) != 4:
        raise ProxyHeaderError("it is not PROXY TCP4|TCP6 and two addresses and two ports")
    source, destination, *ports = words
    if not all(_V1_PORT.fullmatch(port) and int(port) <= 65535 for port in ports):
        raise ProxyHeaderError("a port is invalid")
    if b"%" in source + destination:  # Python would take a zone.
        raise ProxyHeaderError("an address is invalid")
    try:
        host, _ = (_V1_ADDRESSES[family](word.decode("ascii")) for word in (source, destination))
    except ValueError:  # UnicodeDecodeError is one.
        raise ProxyHeaderError("an address is invalid") from None
    return ProxyHeader(end, (_text(host), int(ports[0])))


def _parse_v2(data: bytes) -> ProxyHeader | None:
    if len(data) < _V2_HEAD.size:
        return None
    _, command, family, length = _V2_HEAD.unpack_from(data)
    size = _V2_HEAD.size + length
    if command not in (_LOCAL, _PROXY):
        raise ProxyHeaderError("its version or its command is unknown")
    if size > MAX_V2_BYTES:
        raise ProxyHeaderError(f"it has {size} bytes, and at most {MAX_V2_BYTES} are allowed")
    if len(data) < size:
        return None
    if command == _LOCAL:  # Whatever follows is ignored.
        return ProxyHeader(size, is_local=True)
    if family in _V2_WITHOUT_CLIENT:
        return ProxyHeader(size)
    if family not in _V2_ADDRESSES:
        raise ProxyHeaderError("its family of addresses is unknown")
    addresses, kind = _V2_ADDRESSES[family]
    if length < addresses.size:
        raise ProxyHeaderError("it is too short for its addresses")
    source, _, port, _ = addresses.unpack_from(data, _V2_HEAD.size)
    _check_fields(data[:size], _V2_HEAD.size + addresses.size)
    return ProxyHeader(size, (_text(kind(source)), port))


def _text(host: IPv4Address | IPv6Address) -> str:
    """Return an address; one of IPv4 that is written as IPv6 has one form only."""
    mapped = host.ipv4_mapped if isinstance(host, IPv6Address) else None
    return str(mapped or host)


def _check_fields(header: bytes, at: int) -> None:
    """Check that the optional fields (type, length, value) fill the header, and its checksum."""
    while at < len(header):
        if at + _TLV_HEAD.size > len(header):
            raise ProxyHeaderError("a field at its end is cut")
        kind, length = _TLV_HEAD.unpack_from(header, at)
        at += _TLV_HEAD.size
        if at + length > len(header):
            raise ProxyHeaderError("a field at its end is cut")
        if kind == _CRC_TYPE:
            _check_crc(header, at, length)
        at += length


def _check_crc(header: bytes, at: int, length: int) -> None:
    """Check the checksum at this place. It is of the header with zeros in its own place."""
    expected = header[at : at + length]
    without = header[:at] + bytes(length) + header[at + length :]
    if length != 4 or crc32c(without) != int.from_bytes(expected):
        raise ProxyHeaderError("its checksum is wrong")


def crc32c(data: bytes) -> int:
    """Return the checksum (RFC 3720, appendix B.4): 0.1 ms for the longest header."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _crc_of_byte(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (_CRC_POLYNOMIAL if value & 1 else 0)
    return value


_CRC_TABLE = [_crc_of_byte(value) for value in range(256)]
