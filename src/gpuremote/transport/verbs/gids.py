"""Under which of its addresses a port is used."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from gpuremote.transport.verbs.base import Gid, GidKind

__all__ = ["choose_gid", "gid_of", "host_of", "text_of"]

_MAPPED = bytes(10) + b"\xff\xff"


def gid_of(host: str) -> bytes | None:
    """An IP address as the 16 bytes of a GID; None if it is none."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return _MAPPED + address.packed if address.version == 4 else address.packed


def host_of(address: str) -> str:
    """The host in ``host:port``."""
    return address.rpartition(":")[0].strip("[]")


def text_of(raw: bytes) -> str:
    """A GID as people write it: an IP address."""
    if len(raw) != 16:
        return raw.hex()
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def _link_local(raw: bytes) -> bool:
    return raw[0] == 0xFE and raw[1] & 0xC0 == 0x80


def choose_gid(
    gids: Iterable[Gid],
    *,
    local: bytes | None = None,
    kind: GidKind | None = None,
    near: bytes | None = None,
) -> Gid | None:
    """The address to use, or None if no one will do.

    Parameters
    ----------
    gids : iterable of Gid
        Those of the port.
    local : bytes, optional
        This end's address on the first connection: what reaches the peer there reaches it here.
    kind : GidKind, optional
        What the other end uses; RoCE v1 and v2 do not understand each other. Without it the better
        one is taken.
    near : bytes, optional
        The other end's GID; one of the same family is preferred (IPv4, IPv6, link-local).

    Notes
    -----
    In this order: the right protocol, the address of the first connection, the other end's family,
    addresses of more than one link, the lowest index.
    """

    def rank(gid: Gid) -> tuple[int, bool, bool, bool, int]:
        version = 0 if gid.kind is GidKind.ROCE_V2 else 1
        other_family = near is not None and _family(near) != _family(gid.raw)
        return version, gid.raw != local, other_family, _link_local(gid.raw), gid.index

    usable = [gid for gid in gids if any(gid.raw[8:]) and kind in (None, gid.kind)]
    return min(usable, key=rank, default=None)


def _family(raw: bytes) -> str:
    if raw.startswith(_MAPPED):
        return "IPv4"
    return "link-local" if _link_local(raw) else "IPv6"
