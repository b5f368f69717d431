"""How the two ends of an RDMA connection find each other and try the way. Private.

Over the first connection, in this order::

    client  its ports, how many lanes it wants, its receive ring
    server  the same, as agreed, and its queue pairs
    client  its queue pairs, which are connected by now
    server  checksums of what it has written to the client, on every queue pair
    client  the same, after it has found those right
    server  that it has found these right
"""

from __future__ import annotations

import os
import select
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from gpuremote import _clock
from gpuremote.errors import ProtocolError, TransportUnavailable
from gpuremote.transport.base import TransportStats
from gpuremote.transport.rdma.connection import RdmaConnection
from gpuremote.transport.rdma.control import RECEIVES, RESERVE, SLOT, Control, Ring
from gpuremote.transport.rdma.lanes import InLane, OutLane
from gpuremote.transport.rdma.memory import anonymous
from gpuremote.transport.rdma.rail import Far, Rail, random_psn
from gpuremote.transport.setup import Setup
from gpuremote.transport.verbs.base import (
    Access,
    Completion,
    Gid,
    GidKind,
    Port,
    QueuePair,
    VerbsError,
    VerbsProvider,
)
from gpuremote.transport.verbs.explain import explain_errno, explain_status
from gpuremote.transport.verbs.gids import choose_gid, gid_of, host_of, text_of

__all__ = ["PIECE", "Options", "RdmaPath", "bring_up", "look"]

VERSION: Final = 1
PIECE: Final = 64 << 20
"""Bytes of a payload that are asked for at a time."""
TRIAL: Final = 4096
"""Bytes that are written, on every queue pair, before the way counts as one."""
PATIENCE: Final = 10.0
"""Seconds for such a write: a card gives up after less than 5."""
MAX_LANES: Final = 16
MAX_RAILS: Final = 8
PORTS: Final = 2
"""Ports of a device that are looked at."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an RDMA connection is set up.

    Attributes
    ----------
    lanes : int
        Queue pairs for payload, for each direction; the smaller number of the two ends counts.
    rails : int
        Ports (and so cards) over which the lanes are spread; again the smaller number.
    piece : int
        Bytes of a payload that this end asks for at a time.
    devices : tuple of str
        Names of the devices that may be used; empty for all.
    """

    lanes: int = 2
    rails: int = 1
    piece: int = PIECE
    devices: tuple[str, ...] = ()


def look(
    provider: VerbsProvider,
    options: Options,
    *,
    local: bytes | None = None,
    near: Sequence[tuple[bytes, GidKind]] = (),
) -> list[Rail]:
    """Open the ports that can be used, the best ones first.

    Parameters
    ----------
    local : bytes, optional
        This end's address on the first connection.
    near : sequence, optional
        What the other end uses, port by port.

    Raises
    ------
    TransportUnavailable
        There is none; why, for each device.
    """
    try:
        names = provider.devices()
    except VerbsError as error:
        raise TransportUnavailable(f"no RDMA device: {explain_errno(error)}") from None
    names = [name for name in names if not options.devices or name in options.devices]
    if not names:
        raise TransportUnavailable("no RDMA device (`rdma link` shows what there is)")
    wanted = min(options.rails, len(near)) if near else options.rails
    rails: list[Rail] = []
    reasons: list[str] = []
    for name in names:
        try:
            rail = _open(provider, name, local, near[0] if near else None)
        except VerbsError as error:
            reasons.append(explain_errno(error))
        except TransportUnavailable as error:
            reasons.append(error.message)
        else:
            rails.append(rail)
    if not rails:
        raise TransportUnavailable("; ".join(reasons))
    # The way that the first connection takes is known to reach the peer.
    rails.sort(key=lambda rail: rail.gid.raw != local)
    for rail in rails[wanted:]:
        rail.close()
    return rails[:wanted]


def _open(
    provider: VerbsProvider,
    name: str,
    local: bytes | None,
    near: tuple[bytes, GidKind] | None,
) -> Rail:
    device = provider.open(name)
    reasons = []
    found: list[tuple[Port, Gid]] = []
    try:
        for number in range(1, PORTS + 1):
            try:
                port = device.port(number)
            except VerbsError as error:
                if number == 1:
                    reasons.append(explain_errno(error))
                break
            if not port.active:
                reasons.append(f"port {number} of {name} is {port.state}")
                continue
            gids = device.gids(port)
            kind, other = (near[1], near[0]) if near else (None, None)
            gid = choose_gid(gids, local=local, kind=kind, near=other)
            if gid is None:
                wanted = f" for {kind.value}, as the other end has it" if kind else ""
                reasons.append(f"port {number} of {name} has no usable GID{wanted}")
                continue
            found.append((port, gid))
        if not found:
            raise TransportUnavailable("; ".join(reasons))
        # Stable: port 1, unless the first connection goes over the other one.
        port, gid = min(found, key=lambda one: one[1].raw != local)
    except BaseException:
        device.close()
        raise
    return Rail(device, port, gid)


class RdmaPath:
    """A way that was tried; see ``setup.Path``."""

    def __init__(self, end: _End, setup: Setup, options: Options) -> None:
        self._end = end
        self._setup = setup
        self._options = options

    def connection(self) -> RdmaConnection:
        end = self._end
        names = ", ".join(f"{rail.device.name} as {text_of(rail.gid.raw)}" for rail in end.rails)
        kind = end.rails[0].gid.kind.value
        return RdmaConnection(
            self._setup.connection,
            end.rails,
            end.control,
            end.out_lanes,
            end.in_lanes,
            end.stats,
            blocking=self._setup.blocking,
            piece=self._options.piece,
            reason=f"{kind} on {names}, {len(end.out_lanes)} lanes, tried with a checksum",
        )

    def abandon(self) -> None:
        self._end.close()


def bring_up(setup: Setup, provider: VerbsProvider, options: Options, *, client: bool) -> RdmaPath:
    """One end of the set-up.

    Raises
    ------
    TransportUnavailable
        It does not work; nothing is left.
    """
    local = gid_of(host_of(setup.connection.local_address))
    try:
        side = _client if client else _server
        end = side(setup, provider, options, local)
    except VerbsError as error:
        raise TransportUnavailable(explain_errno(error)) from None
    return RdmaPath(end, setup, options)


def _client(setup: Setup, provider: VerbsProvider, options: Options, local: bytes | None) -> _End:
    rails = look(provider, options, local=local)
    end: _End | None = None
    try:
        setup.say(_hello(rails, options.lanes))
        answer = setup.hear()
        theirs = _Hello(answer)
        for extra in rails[len(theirs.rails) :]:
            extra.close()
        del rails[len(theirs.rails) :]
        end = _End(rails, theirs, min(options.lanes, theirs.lanes))
        end.meet(answer)
        setup.say(end.told())
        end.check(setup.hear())
        setup.say(end.write(setup))
        if setup.hear().get("right") is not True:
            raise ProtocolError("the set-up of RDMA ends without a word")
    except BaseException:
        _give_back(end, rails)
        raise
    return end


def _server(setup: Setup, provider: VerbsProvider, options: Options, local: bytes | None) -> _End:
    theirs = _Hello(setup.hear())
    near = [(far.gid, kind) for far, kind in theirs.rails]
    rails = look(provider, options, local=local, near=near)
    end: _End | None = None
    try:
        _check_kind(rails, theirs.rails[0][1])
        end = _End(rails, theirs, min(options.lanes, theirs.lanes))
        setup.say({**_hello(rails, len(end.out_lanes)), **end.told()})
        end.meet(setup.hear())
        setup.say(end.write(setup))
        end.check(setup.hear())
        setup.say({"right": True})
    except BaseException:
        _give_back(end, rails)
        raise
    return end


def _check_kind(rails: Sequence[Rail], kind: GidKind) -> None:
    for rail in rails:
        if rail.gid.kind is not kind:
            raise TransportUnavailable(
                f"{rail.device.name} speaks {rail.gid.kind.value} and the other end {kind.value}"
            )


def _give_back(end: _End | None, rails: Sequence[Rail]) -> None:
    if end is not None:
        end.close()
    else:
        for rail in rails:
            rail.close()


# -- what is said ----------------------------------------------------------------------------------


def _hello(rails: Sequence[Rail], lanes: int) -> dict[str, Any]:
    return {
        "version": VERSION,
        "lanes": lanes,
        "ring": [RECEIVES, SLOT],
        "rails": [
            {
                "gid": rail.gid.raw,
                "kind": rail.gid.kind.value,
                "lid": rail.port.lid,
                "mtu": rail.port.mtu,
                "message": rail.port.max_message,
            }
            for rail in rails
        ],
    }


class _Hello:
    """What the other end said about itself."""

    def __init__(self, message: dict[str, Any]) -> None:
        if message.get("version") != VERSION:
            raise TransportUnavailable(
                f"the other end speaks version {message.get('version')!r} of this transport, "
                f"and this one {VERSION}"
            )
        self.lanes = _number(message.get("lanes"), 1, MAX_LANES)
        ring = _list(message.get("ring"), 2, 2)
        self.ring = Ring(_number(ring[0], 2 * RESERVE, 1 << 16), _number(ring[1], 256, 1 << 20))
        self.rails = [_far(rail) for rail in _list(message.get("rails"), 1, MAX_RAILS)]


def _far(said: object) -> tuple[Far, GidKind]:
    if not isinstance(said, dict):
        raise ProtocolError("a port that is none")
    gid = said.get("gid")
    if not isinstance(gid, bytes) or len(gid) != 16:
        raise ProtocolError("a port without a GID")
    try:
        kind = GidKind(said.get("kind"))
    except ValueError:
        raise TransportUnavailable(f"the other end speaks {said.get('kind')!r}") from None
    mtu = _number(said.get("mtu"), 256, 4096)
    if mtu & (mtu - 1):
        raise ProtocolError(f"an MTU of {mtu}")
    message = _number(said.get("message"), TRIAL, 1 << 32)
    return Far(gid, _number(said.get("lid"), 0, 0xFFFF), mtu, message), kind


def _number(said: object, low: int, high: int) -> int:
    if type(said) is not int or not low <= said <= high:
        raise ProtocolError(f"{said!r} in the set-up of RDMA, where {low} to {high} is expected")
    return said


def _list(said: object, low: int, high: int) -> list[Any]:
    if not isinstance(said, list) or not low <= len(said) <= high:
        raise ProtocolError("a list of another length in the set-up of RDMA")
    return said


def _pair(said: object) -> tuple[int, int]:
    number, psn = _list(said, 2, 2)
    return _number(number, 0, (1 << 24) - 1), _number(psn, 0, (1 << 24) - 1)


# -- one end ---------------------------------------------------------------------------------------


class _End:
    """What one end has of a connection that is being set up."""

    def __init__(self, rails: list[Rail], theirs: _Hello, lanes: int) -> None:
        self.rails = rails
        self.stats = TransportStats()
        self._trials: list[_Trial] = []
        for rail, (far, _) in zip(rails, theirs.rails, strict=False):
            rail.far = far
        try:
            pair = rails[0].queue_pair(*Control.depths())
            self.control = Control(rails[0], pair, self.stats)
            self.control.prime(theirs.ring)
            self._psn = random_psn()
            spread = [rails[number % len(rails)] for number in range(lanes)]
            self.out_lanes = [OutLane(n, rail, self.stats) for n, rail in enumerate(spread)]
            self.in_lanes = [InLane(n, rail) for n, rail in enumerate(spread)]
            # One to write to for each queue pair of the other end that writes.
            self._trials = [_Trial(rail) for rail in (rails[0], *spread)]
        except BaseException:
            self.close()
            raise
        self._targets: list[tuple[int, int]] = []

    @property
    def _writing(self) -> list[tuple[Rail, QueuePair]]:
        lanes = [(lane.rail, lane.pair) for lane in self.out_lanes]
        return [(self.rails[0], self.control.pair), *lanes]

    def told(self) -> dict[str, Any]:
        return {
            "control": [self.control.pair.number, self._psn],
            "out": [[lane.pair.number, lane.psn] for lane in self.out_lanes],
            "in": [[lane.pair.number, lane.psn] for lane in self.in_lanes],
            "trial": [[trial.address, trial.rkey] for trial in self._trials],
        }

    def meet(self, said: dict[str, Any]) -> None:
        """Connect to the other end's queue pairs."""
        lanes = len(self.out_lanes)
        out = [_pair(end) for end in _list(said.get("out"), lanes, lanes)]
        into = [_pair(end) for end in _list(said.get("in"), lanes, lanes)]
        trial = _list(said.get("trial"), lanes + 1, lanes + 1)
        for target in trial:
            address, rkey = _list(target, 2, 2)
            self._targets.append(
                (_number(address, 0, (1 << 64) - 1), _number(rkey, 0, (1 << 32) - 1))
            )
        self.rails[0].connect(self.control.pair, self._psn, *_pair(said.get("control")))
        for out_lane, end in zip(self.out_lanes, into, strict=True):
            out_lane.rail.connect(out_lane.pair, out_lane.psn, *end)
        for in_lane, end in zip(self.in_lanes, out, strict=True):
            in_lane.rail.connect(in_lane.pair, in_lane.psn, *end)

    def write(self, setup: Setup) -> dict[str, Any]:
        """Write to the other end on each queue pair that writes; the checksums.

        Raises
        ------
        TransportUnavailable
            It did not get there.
        """
        sums = []
        for (rail, pair), (address, rkey) in zip(self._writing, self._targets, strict=True):
            view, here = anonymous(TRIAL)
            view[:] = os.urandom(TRIAL)
            memory = rail.device.register(here, TRIAL, Access.READ_HERE)
            try:
                work = rail.works.add(_TrialWrite(), 0)
                pair.post_write(work, here, TRIAL, memory.lkey, address, rkey, signaled=True)
                _await(rail, work, min(_clock.now() + PATIENCE, setup.deadline))
            except BaseException:
                # Before its memory goes.
                pair.fail()
                raise
            finally:
                memory.close()
            sums.append(zlib.crc32(view))
        return {"sums": sums}

    def check(self, said: dict[str, Any]) -> None:
        """Compare what the other end has written with its checksums.

        Raises
        ------
        TransportUnavailable
            They differ.
        """
        sums = _list(said.get("sums"), len(self._trials), len(self._trials))
        if [trial.checksum() for trial in self._trials] != sums:
            raise TransportUnavailable("what the other end wrote arrived as something else")
        while self._trials:
            self._trials.pop().close()

    def close(self) -> None:
        while self._trials:
            self._trials.pop().close()
        for rail in self.rails:
            rail.close()
        if hasattr(self, "control"):
            self.control.close()


class _Trial:
    """Memory that the other end writes to, to show that it can."""

    def __init__(self, rail: Rail) -> None:
        self._view, self.address = anonymous(TRIAL)
        access = Access.WRITE_HERE | Access.WRITE_THERE
        self._memory = rail.device.register(self.address, TRIAL, access)
        self.rkey = self._memory.rkey

    def checksum(self) -> int:
        return zlib.crc32(self._view)

    def close(self) -> None:
        self._memory.close()


class _TrialWrite:
    """Who posted the write of a trial; see ``rail.Owner``."""

    def completed(self, work: int, tag: int, completion: Completion) -> None: ...

    def describe(self, work: int, tag: int) -> str:
        return "a trial"

    def refused(self, completion: Completion) -> bool:
        return False


def _await(rail: Rail, work: int, deadline: float) -> None:
    """Wait until one work request has ended well."""
    poll = select.poll()
    poll.register(rail.queue.fileno(), select.POLLIN)
    while True:
        rail.queue.arm()
        for completion in rail.queue.poll(16):
            if completion.status:
                raise TransportUnavailable(
                    f"a trial write on {rail.device.name} from {text_of(rail.gid.raw)} to "
                    f"{text_of(rail.far.gid)} failed with {explain_status(completion.status)}"
                )
            rail.works.pop(completion.work)
            if completion.work == work:
                return
        left = deadline - _clock.now()
        if left <= 0:
            raise TransportUnavailable(
                f"a trial write on {rail.device.name} did not end in {PATIENCE:.0f} s"
            )
        poll.poll(1000 * min(left, 0.5))
