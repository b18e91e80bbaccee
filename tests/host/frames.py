"""Frames as only the host's root could send them from a slot: whatever sender, whatever address."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

from hostruntime.host.run import run
from tests.host.topology import dns_query, knock

BROADCAST = b"\xff" * 6
_IPV4, _ARP = 0x0800, 0x0806


def own_mac() -> bytes:
    """The address of `eth0` in the calling thread's namespace."""
    (link,) = json.loads(run(["ip", "-j", "link", "show", "eth0"], timeout=10).stdout)
    return bytes.fromhex(link["address"].replace(":", ""))


def mac_of(gateway: tuple[str, int]) -> bytes:
    """The address of the host's end of `eth0`, as the calling thread's namespace learns it."""
    with suppress(OSError):
        knock(*gateway, timeout=0.5)
    known = json.loads(run(["ip", "-j", "neighbour"], timeout=10).stdout)
    (found,) = (entry["lladdr"] for entry in known if entry["dst"] == gateway[0])
    return bytes.fromhex(found.replace(":", ""))


def send_frame(frame: bytes) -> None:
    """Send a frame as it is (packet(7))."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as handle:
        handle.bind(("eth0", 0))
        handle.send(frame)


def send_raw(packet: bytes, target: str) -> None:
    """Send an IPv4 packet with a header of our own (raw(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as handle:
        handle.sendto(packet, (target, 0))


def udp_frame(macs: tuple[bytes, bytes], packet: bytes) -> bytes:
    """An Ethernet frame with an IPv4 packet; ``macs`` are whom it is for and whom it is from."""
    return b"".join(macs) + struct.pack("!H", _IPV4) + packet


def udp_packet(source: str, target: str, port: int, data: bytes) -> bytes:
    """An IPv4 packet with one UDP datagram (RFC 791, RFC 768; no UDP checksum)."""
    body = struct.pack("!HHHH", 40_000, port, 8 + len(data), 0) + data
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 7, 0, 64, socket.IPPROTO_UDP, 0)
    words = struct.unpack("!10H", head + ends)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + ends + body


def dns_packet(source: str, resolver: str, name: str) -> bytes:
    """A question to a resolver."""
    return udp_packet(source, resolver, 53, dns_query(name))


def arp_reply(mac: bytes, claimed: str, told: str) -> bytes:
    """Claim an address for a MAC, to everybody (RFC 826)."""
    ends = mac + socket.inet_aton(claimed) + BROADCAST + socket.inet_aton(told)
    return BROADCAST + mac + struct.pack("!HHHBBH", _ARP, 1, _IPV4, 6, 4, 2) + ends


def overheard(address: str, meanwhile: Callable[[], object]) -> bool:
    """Tell whether `eth0` here is sent packets for an address while something happens."""
    wanted = socket.inet_aton(address)
    kind = socket.htons(_IPV4)
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, kind) as handle:
        handle.bind(("eth0", _IPV4))
        meanwhile()
        handle.settimeout(0.2)
        until = time.monotonic() + 2
        with suppress(TimeoutError):
            while time.monotonic() < until:
                if handle.recv(2048)[16:20] == wanted:
                    return True
    return False
