"""Uploads of which the server may have the bytes already, as steps that either driver can make."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Generic, TypeAlias, TypeVar

from gpuremote import _clock
from gpuremote.client.core import Core
from gpuremote.client.waits import Wait
from gpuremote.memory.host import HostArray
from gpuremote.wire.batch import Op
from gpuremote.wire.digests import sketch_of

__all__ = ["Course", "Steps", "upload"]

T = TypeVar("T")

Steps: TypeAlias = Generator[Wait | memoryview, object, list[T]]
"""What is to be waited for, whose answer is to be sent back; or memory whose digest is."""


class Course(Generic[T]):
    """Steps that a driver makes, until there are none left.

    To be closed in any case.

    Parameters
    ----------
    timeout : float or None
        Seconds for all of them.

    Attributes
    ----------
    made : list
        What they gave, in the end.
    """

    def __init__(self, steps: Steps[T], timeout: float | None) -> None:
        self._steps = steps
        self._deadline = None if timeout is None else _clock.now() + timeout
        self.made: list[T] = []

    def next(self, answer: object) -> Wait | memoryview | None:
        """The step after the one with this answer (None: the first); None: there is none."""
        try:
            return self._steps.send(answer)
        except StopIteration as end:
            self.made = end.value
            return None

    @property
    def left(self) -> float | None:
        """Seconds for the step."""
        return None if self._deadline is None else max(0.0, self._deadline - _clock.now())

    def close(self) -> None:
        self._steps.close()


def upload(
    core: Core, device: int, hosts: Sequence[HostArray], make: Callable[[int, HostArray], T]
) -> Steps[T]:
    """Upload arrays, those of which the server has the bytes without sending them.

    To be closed where a step fails: what was offered is taken back then.

    Parameters
    ----------
    make : callable
        Makes an array of its number.

    Yields
    ------
    Wait or memoryview

    Returns
    -------
    list
        The arrays, in order.
    """
    known, connection = core.known, core.peer.connection
    wanted = [known.worth_it(host.view.nbytes, connection) for host in hosts]
    if any(wanted):
        listing = known.ask(lambda: core.ask(Op.CONTENTS, kind="contents"))
        if listing is not None:
            yield listing
    sketches = [
        sketch_of(host.view) if wants else b"" for host, wants in zip(hosts, wanted, strict=True)
    ]
    made: dict[int, T] = {}
    offered: dict[int, Wait] = {}
    pending: Wait | None = None
    try:
        for position, (host, sketch) in enumerate(zip(hosts, sketches, strict=True)):
            if sketch and known.has(sketch):
                digest = yield host.view
                blob = [list(host.shape), host.dtype.str.lstrip("<|="), device, digest]
                core.free_dropped()
                wait = core.ask(Op.OFFER, kind="offer", name="put", blob=blob)
                offered[position] = wait
                made[position] = make(wait.number, host)
        if len(offered) > 1:
            core.trips["offer"] -= len(offered) - 1  # nobody waits before all are asked
        rest = [position for position in range(len(hosts)) if position not in offered]
        begin, alone = _clock.now(), not core.peer.bulk_in_flight
        if rest:  # they go out while the server looks for the others
            items = [
                (core.metas.get(host.shape, host.dtype, device), host.view)
                for host in (hosts[position] for position in rest)
            ]
            keep = [bool(sketches[position]) for position in rest]
            numbers, pending = core.put_many(items, keep)
            for position, number in zip(rest, numbers, strict=True):
                made[position] = make(number, hosts[position])
        missing = []
        for position, wait in offered.items():
            there = bool((yield wait))
            known.note(sketches[position], there)
            if there:
                core.stats.payload_spared += hosts[position].view.nbytes
            else:
                missing.append(position)
        if missing:
            views = [hosts[position].view for position in missing]
            yield core.bring([offered[position].number for position in missing], views)
        if pending is not None:
            yield pending
    except BaseException:
        if pending is not None:
            core.cancel(pending)
        core.withdraw([wait.number for wait in offered.values()])
        raise
    if alone and not offered:
        known.sent(sum(host.view.nbytes for host in hosts), _clock.now() - begin)
    for position in rest:
        if sketches[position]:
            known.note(sketches[position], True)
    return [made[position] for position in range(len(hosts))]
