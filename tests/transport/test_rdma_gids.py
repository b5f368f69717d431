"""Under which address a port is used."""

from __future__ import annotations

import pytest

from gpuremote.transport.verbs.base import Gid, GidKind
from gpuremote.transport.verbs.gids import choose_gid, gid_of, host_of, text_of

V1, V2 = GidKind.ROCE_V1, GidKind.ROCE_V2


def gid(index: int, host: str, kind: GidKind = V2) -> Gid:
    raw = gid_of(host)
    assert raw is not None
    return Gid(index, raw, kind)


LINK_LOCAL = gid(1, "fe80::1")
GLOBAL = gid(2, "2001:db8::1")
MAPPED = gid(3, "10.0.0.1")
OTHER = gid(4, "10.1.0.1")
OLD = gid(0, "10.0.0.1", V1)
ZERO = Gid(0, bytes(16), V2)
NO_INTERFACE = Gid(0, bytes.fromhex("fe80") + bytes(14), V2)


@pytest.mark.parametrize(
    ("gids", "local", "chosen"),
    [
        ([], None, None),
        ([ZERO, NO_INTERFACE], None, None),
        ([LINK_LOCAL], None, LINK_LOCAL),
        ([LINK_LOCAL, GLOBAL], None, GLOBAL),
        ([LINK_LOCAL, GLOBAL, MAPPED], None, GLOBAL),
        ([LINK_LOCAL, GLOBAL, MAPPED, OTHER], "10.1.0.1", OTHER),
        ([LINK_LOCAL, GLOBAL, MAPPED], "2001:db8::1", GLOBAL),
        ([LINK_LOCAL, GLOBAL], "fe80::1", LINK_LOCAL),
        ([OLD, MAPPED], None, MAPPED),
        ([OLD, OTHER], "10.0.0.1", OTHER),
        ([OLD], None, OLD),
        ([MAPPED], "127.0.0.1", MAPPED),
    ],
)
def test_choice(gids: list[Gid], local: str | None, chosen: Gid | None) -> None:
    assert choose_gid(gids, local=gid_of(local) if local else None) == chosen
    assert choose_gid(gids[::-1], local=gid_of(local) if local else None) == chosen


def test_both_ends_speak_the_same_version() -> None:
    assert choose_gid([OLD, MAPPED], kind=V1) == OLD
    assert choose_gid([OLD, MAPPED], kind=V2) == MAPPED
    assert choose_gid([MAPPED], kind=V1) is None


def test_the_family_of_the_other_end_is_preferred() -> None:
    gids = [LINK_LOCAL, GLOBAL, MAPPED]
    assert choose_gid(gids, near=OTHER.raw) == MAPPED
    assert choose_gid(gids, near=gid(0, "2001:db8::9").raw) == GLOBAL
    assert choose_gid(gids, near=gid(0, "fe80::9").raw) == LINK_LOCAL


def test_addresses() -> None:
    assert host_of("10.0.0.1:77") == "10.0.0.1"
    assert host_of("[fe80::1%eth0]:77") == "fe80::1%eth0"
    assert gid_of("fe80::1%eth0") == LINK_LOCAL.raw
    assert gid_of("unix") is None
    assert gid_of("") is None
    assert text_of(MAPPED.raw) == "10.0.0.1"
    assert text_of(GLOBAL.raw) == "2001:db8::1"
