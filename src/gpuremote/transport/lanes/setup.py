"""Finding out whether a way is long enough for several connections, and opening them.

The client knows how long an answer of the handshake took. On a short way it says so in one message,
which nobody answers, and both ends go on as they are. On a long one the two measure delay and
bandwidth with a burst of at most 1 MiB in each direction, and the client opens the lanes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from gpuremote import _clock
from gpuremote.errors import GpuRemoteError, ProtocolError, TransportUnavailable
from gpuremote.transport import congestion
from gpuremote.transport._sockets import tune
from gpuremote.transport.base import Connection
from gpuremote.transport.lanes.compression import CODECS, Rule, agree, codec_named, wanted_codecs
from gpuremote.transport.lanes.connection import LanesConnection, tune_lane
from gpuremote.transport.lanes.offer import LaneWishes, Line, lane_proof
from gpuremote.transport.lanes.rule import (
    LONG_WAY,
    MAX_LANES,
    Way,
    bandwidth_of,
    kernel_limit,
    lanes_for,
    window_between,
)
from gpuremote.transport.setup import Path, Setup, Unneeded
from gpuremote.transport.tcp import StreamConnection
from gpuremote.transport.tls import TlsSocket

__all__ = ["Lanes"]

BURST: Final = 1 << 20
"""Bytes sent to measure a rate."""
BURST_TIME: Final = 0.5
"""Seconds after which no more of them are sent."""
PART: Final = 32 << 10
"""Bytes of one message of a burst."""
PATIENCE: Final = 5.0
"""Seconds for the lanes to be opened, and to come."""
PINGS: Final = 4
"""Answers more, where the kernel takes the way for a short one: what was slow may be the answer."""
ROOM: Final = 12
"""Round trips that all of it may take, and that have to be left of the time to connect."""
NONCE: Final = 32


class _LanesPath:
    """Lanes that are open at both ends."""

    def __init__(
        self, setup: Setup, lines: Sequence[Line], codec: str, rule: Rule, way: Way | None, why: str
    ) -> None:
        self._setup = setup
        self._lines = lines
        self._codec = codec
        self._rule = rule
        self._way = way
        self._why = why

    def connection(self) -> Connection:
        first = self._setup.connection
        assert isinstance(first, StreamConnection)
        for line in self._lines:
            sock = line.raw if isinstance(line, TlsSocket) else line
            tune(sock)
            tune_lane(sock)
        codecs = (codec_named(self._codec), codec_named(self._codec)) if self._codec else None
        try:
            return LanesConnection(
                first,
                self._lines,
                codecs=codecs or (None, None),
                rule=self._rule,
                reason=self._why,
                facts=_facts(self._way, self._codec),
            )
        except BaseException:  # the first one is broken already
            self.abandon()
            raise

    def abandon(self) -> None:
        for line in self._lines:
            line.close()


def _facts(way: Way | None, codec: str) -> dict[str, object]:
    facts: dict[str, object] = {"compression": codec}
    if way is not None:
        facts |= {"delay": way.delay, "bandwidth": way.bandwidth, "window": way.window}
    return facts


class Lanes:
    """Sets up what the transport tcp is on a long way; see ``transport.setup.Upgrade``."""

    @staticmethod
    def probe() -> tuple[bool, str]:
        return StreamConnection.probe()

    @staticmethod
    def connect(setup: Setup) -> Path:
        """The client's end."""
        if setup.wishes is None:
            raise ProtocolError("the server wants lanes, which were not offered to it")
        return _Client(setup, setup.wishes).connect()

    @staticmethod
    def accept(setup: Setup) -> Path:
        """The server's end."""
        asked = _hear(setup)
        gate = setup.gate
        if gate is None:
            raise TransportUnavailable("this server takes one connection only")
        nonce = gate.open(setup.secret)
        try:
            here = [
                name for name in _texts(asked.get("codecs")) if name in wanted_codecs("auto")[0]
            ]
            setup.say(
                {
                    "nonce": nonce,
                    "codecs": here,
                    "sends": kernel_limit("tcp_wmem"),
                    "takes": kernel_limit("tcp_rmem"),
                }
            )
            while "ping" in (message := _hear(setup)):
                setup.say({"pong": 1})
            if "burst" in message:
                arrivals = _take_burst(setup, message)
                delay = message.get("delay")
                setup.say({"rate": bandwidth_of(arrivals, _number(delay)) or 0.0})
                _send_burst(setup, {})
                message = _hear(setup)
            codec = message.get("codec")
            if codec not in ("", *here):
                raise ProtocolError(f"the client compresses with {codec!r}, which was not offered")
            dialled = _lane_numbers(message.get("dialled"))
            rule = _rule(message)
            found = gate.collect(dialled, min(setup.left, PATIENCE))
            lines = list(found.values())
            path = _LanesPath(setup, lines, codec, rule, None, f"{len(lines)} lanes")
            with contextlib.ExitStack() as undo:
                undo.callback(path.abandon)
                setup.say({"lanes": list(found)})
                if not found:
                    raise TransportUnavailable("no lane came")
                undo.pop_all()
            return path
        finally:
            gate.close()


class _Client:
    """The client's end of a set-up."""

    def __init__(self, setup: Setup, wishes: LaneWishes) -> None:
        self._setup = setup
        self._dial_lane = wishes.dial
        self._policy = wishes.policy
        self._codecs, self._no_codec = wanted_codecs(wishes.policy.compression)
        # Asked for by name: worth a lane also on a short way.
        self._insists = wishes.policy.compression in CODECS and bool(self._codecs)

    def connect(self) -> Path:
        setup, policy = self._setup, self._policy
        asked = bool(policy.number > 1 or self._insists)
        if not asked:
            self._decline_if_short()
        heard = self._ask({"codecs": self._codecs})
        if not self._seems_long():
            # A relay nearby, or an end that is busy.
            for _ in range(PINGS):
                if policy.answer < LONG_WAY:
                    break
                self._ask({"ping": 1})
        if not asked:
            self._decline_if_short()
        delay = policy.answer
        if setup.left < ROOM * delay:
            self._decline(f"one connection: no time left to open more, {Way(delay)}")
        nonce = heard.get("nonce")
        if not isinstance(nonce, bytes) or len(nonce) != NONCE:
            raise ProtocolError("the server tells no nonce for lanes")
        codec, why = agree(self._codecs, _texts(heard.get("codecs"))) if self._codecs else ("", "")
        self._no_codec = self._no_codec or why
        way = self._measured(delay, heard)
        number = policy.number or lanes_for(way)
        if number == 1 and not codec:
            self._decline(f"one connection: {way}")
        lines = self._dial(number, nonce)
        return self._agreed(lines, codec, way)

    def _measured(self, delay: float, heard: dict[str, Any]) -> Way:
        sends, takes = _number(heard.get("sends")), _number(heard.get("takes"))
        up = window_between(kernel_limit("tcp_wmem"), int(takes))
        down = window_between(int(sends), kernel_limit("tcp_rmem"))
        window = min((w for w in (up, down) if w), default=0)
        if self._policy.number or delay < LONG_WAY:
            return Way(delay, None, window)
        setup = self._setup
        _send_burst(setup, {"delay": delay})
        rate = _number(setup.hear().get("rate"))
        back = bandwidth_of(_take_burst(setup, setup.hear()), delay) or 0.0
        return Way(delay, max(rate, back) or None, window)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        begin = _clock.now()
        self._setup.say(message)
        heard = self._setup.hear()
        self._policy.heard(_clock.now() - begin)
        return heard

    def _seems_long(self) -> bool:
        """Whether the kernel, too, finds the way long."""
        first = self._setup.connection
        if not isinstance(first, StreamConnection):
            return False
        return (congestion.round_trip(first._sock) or 0.0) >= LONG_WAY

    def _decline_if_short(self) -> None:
        delay = self._policy.answer
        if delay < LONG_WAY:
            self._decline(f"one connection: answers take {delay * 1e3:.2g} ms")

    def _decline(self, why: str) -> NoReturn:
        self._setup.say({"unneeded": why})
        raise Unneeded(why)

    def _dial(self, number: int, nonce: bytes) -> dict[int, Line]:
        """Open the lanes, all at a time; those that came about, in order."""
        setup, dial = self._setup, self._dial_lane
        deadline = _clock.now() + min(setup.left / 2, PATIENCE)
        found: dict[int, Line] = {}

        def open_one(lane: int) -> None:
            # A lane that can't be had is one fewer.
            with contextlib.suppress(GpuRemoteError, OSError):
                found[lane] = dial(lane, lane_proof(setup.secret, nonce, lane), deadline)

        threads = [
            threading.Thread(target=open_one, args=(lane,), name="gpuremote-lane", daemon=True)
            for lane in range(number)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return dict(sorted(found.items()))

    def _rule_wish(self, way: Way) -> dict[str, Any]:
        return {"always": self._insists, "rate": way.bandwidth or 0.0, "delay": way.delay}

    def _agreed(self, lines: dict[int, Line], codec: str, way: Way) -> Path:
        """Those of the lanes that the server has too."""
        try:
            self._setup.say({"dialled": list(lines), "codec": codec, **self._rule_wish(way)})
            agreed = _lane_numbers(self._setup.hear().get("lanes"))
            if not set(agreed) <= set(lines):
                raise ProtocolError("the server has lanes that were not opened")
            if not agreed:
                raise TransportUnavailable("no lane came about")
        except BaseException:
            for line in lines.values():
                line.close()
            raise
        for lane in set(lines) - set(agreed):
            lines[lane].close()
        number = self._policy.number
        count = f"{len(agreed)} lane{'s' if len(agreed) > 1 else ''}"
        why = f"{count}{' as asked for' if number > 1 else ''}: {way}"
        if codec:
            why += f"; {codec}" + ("" if self._insists else " where it pays")
        elif self._no_codec:
            why += f"; {self._no_codec}"
        rule = Rule(always=self._insists, rate=way.bandwidth, delay=way.delay)
        return _LanesPath(self._setup, [lines[n] for n in agreed], codec, rule, way, why)


def _hear(setup: Setup) -> dict[str, Any]:
    """The client's next message, unless it says that it goes on as it is."""
    message = setup.hear()
    if "unneeded" in message:
        raise Unneeded(str(message["unneeded"]))
    return message


def _send_burst(setup: Setup, first: dict[str, Any]) -> None:
    begin = _clock.now()
    for _ in range(BURST // PART):
        setup.say({"burst": bytes(PART), **first})
        if _clock.now() - begin > BURST_TIME:
            break
    setup.say({"burst": b""})


def _take_burst(setup: Setup, message: dict[str, Any]) -> list[tuple[float, int]]:
    """When how much of the other end's burst came, from its first message on."""
    arrivals: list[tuple[float, int]] = []
    while True:
        part = message.get("burst")
        if not isinstance(part, bytes):
            raise ProtocolError("a burst with something else in between")
        if not part:
            return arrivals
        arrivals.append((_clock.now(), len(part)))
        message = setup.hear()


def _rule(message: dict[str, Any]) -> Rule:
    rate = _number(message.get("rate"))
    delay = _number(message.get("delay"))
    return Rule(always=bool(message.get("always")), rate=rate or None, delay=delay)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e15:
        raise ProtocolError("a set-up message of lanes without a number")
    return float(value)


def _texts(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) > 16 or not all(isinstance(t, str) for t in value):
        raise ProtocolError("a set-up message of lanes without a list of names")
    return value


def _lane_numbers(value: object) -> list[int]:
    if (
        not isinstance(value, list)
        or not all(type(n) is int and 0 <= n < MAX_LANES for n in value)
        or len(set(value)) != len(value)
    ):
        raise ProtocolError("a set-up message of lanes without their numbers")
    return value
