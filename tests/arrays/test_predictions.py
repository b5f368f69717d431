"""What is predicted of results is what the server finds: it looks at each of them, and a difference
is an InternalError."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest

from gpuremote.cupy._array import ndarray, single
from gpuremote.errors import GpuRemoteError, InternalError
from gpuremote.ops import catalogue
from gpuremote.ops.spec import OpSpec
from gpuremote.wire.batch import ALL_STREAMS
from gpuremote.wire.batch import Op as Record

CHECKS: Final = 40_000
SHAPES: Final = [(), (3,), (1,), (0,), (2, 3), (3, 3), (4, 1, 3), (2, 0)]
DTYPES: Final = ["?", "b", "i4", "u1", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
Op = Callable[[Any, Any, Any, random.Random], Any]

OPS: Final[list[Op]] = [
    lambda xp, x, y, r: x + y,
    lambda xp, x, y, r: x * 2,
    lambda xp, x, y, r: x / (y + 1),
    lambda xp, x, y, r: x - 0.5,
    lambda xp, x, y, r: x < y,
    lambda xp, x, y, r: xp.maximum(x, y),
    lambda xp, x, y, r: xp.where(x > 0, x, y),
    lambda xp, x, y, r: r.choice([xp.sin, xp.exp, xp.isnan, xp.sign, xp.square, xp.abs])(x),
    lambda xp, x, y, r: r.choice([xp.sum, xp.prod, xp.mean, xp.any])(x, axis=axis(x, r)),
    lambda xp, x, y, r: r.choice([xp.max, xp.std, xp.median])(x, axis=axis(x, r), keepdims=True),
    lambda xp, x, y, r: r.choice([xp.argmax, xp.cumsum])(x, axis=axis(x, r)),
    lambda xp, x, y, r: xp.sort(x, axis=-1),
    lambda xp, x, y, r: xp.flip(x, axis(x, r)),
    lambda xp, x, y, r: x.reshape(-1),
    lambda xp, x, y, r: x.T,
    lambda xp, x, y, r: xp.expand_dims(x, r.randint(0, x.ndim)),
    lambda xp, x, y, r: xp.squeeze(x),
    lambda xp, x, y, r: xp.concatenate([x, y], axis=None),
    lambda xp, x, y, r: xp.stack([x, x], axis=0),
    lambda xp, x, y, r: xp.matmul(x, y),
    lambda xp, x, y, r: xp.tensordot(x, y, 0),
    lambda xp, x, y, r: xp.linalg.svd(x, full_matrices=r.random() < 0.5)[0],
    lambda xp, x, y, r: xp.linalg.qr(x)[1],
    lambda xp, x, y, r: xp.fft.rfft(x, axis=axis(x, r) or 0),
    lambda xp, x, y, r: xp.diff(x),
    lambda xp, x, y, r: xp.pad(x, 1),
    lambda xp, x, y, r: xp.tile(x, 2),
    lambda xp, x, y, r: x.astype(r.choice(DTYPES)),
    lambda xp, x, y, r: x[..., None],
    lambda xp, x, y, r: x[r.randint(0, 2) :],
    lambda xp, x, y, r: xp.round(x, 1),
    lambda xp, x, y, r: xp.clip(x, 0, 2),
]


def axis(x: Any, r: random.Random) -> Any:
    return r.choice([None, *range(x.ndim)])


def test_forty_thousand_results_are_as_predicted(xp: Any) -> None:
    chance = random.Random(5)
    session = xp.session()
    session.synchronize()
    before = session.server_stats()["ops"]
    seeds = [
        xp.asarray((np.arange(np.prod(shape)).reshape(shape) % 5).astype(dtype))
        for shape in SHAPES
        for dtype in DTYPES
    ]
    pool = list(seeds)
    issued = session.stats().ops
    failures: list[type] = []
    while session.stats().ops - issued < CHECKS + 2000:
        for _ in range(1000):
            op, x = chance.choice(OPS), chance.choice(pool)
            y = x if chance.random() < 0.8 else chance.choice(pool)
            try:
                found = op(xp, x, y, chance)
            except InternalError:
                raise
            except (GpuRemoteError, ValueError, TypeError, IndexError):
                continue  # refused here
            failures += [type(error) for error in session._core._failures.values()]
            session._core._failures.clear()
            if found.size <= 64 and found.ndim <= 4:
                pool[chance.randrange(len(pool))] = found
            if chance.random() < 0.1:  # else all become large, complex or not a number
                pool[chance.randrange(len(pool))] = chance.choice(seeds)
    session._core.wait(session._core.ask(Record.SYNC, ALL_STREAMS, kind="synchronize"))
    failures += [type(error) for error in session._core._failures.values()]
    session._core._failures.clear()
    # Values that NumPy refuses are no prediction's fault.
    assert InternalError not in failures
    assert session._core._more_failures == 0
    assert session.server_stats()["ops"] - before >= CHECKS


def test_a_wrong_rule_is_found(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check bites: with a rule that says another shape than comes out."""
    right = catalogue.CATALOGUE["cumulative_sum"]

    def wrong(operands: Any, params: Any) -> Any:
        ((shape, dtype),) = right.infer(operands, params)
        return (((*shape, 1), dtype),)

    # Only this end believes it; the op that uses the result is declared for what is not there.
    monkeypatch.setitem(
        catalogue.CATALOGUE, "cumulative_sum", OpSpec(right.name, wrong, params=right.params)
    )
    x: ndarray = single("cumulative_sum", xp.arange(5.0), axis=0)
    assert x.shape == (5, 1)
    with pytest.raises(GpuRemoteError, match="was declared for"):
        (x + 1).get()
    xp.session()._core.take_failures()
