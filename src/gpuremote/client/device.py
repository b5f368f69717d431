"""A remote device: makes arrays, takes uploads and copies, orders work in streams."""

from __future__ import annotations

import operator
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from gpuremote._types import Shape
from gpuremote.client import issue
from gpuremote.client.array import RemoteArray
from gpuremote.client.core import Core
from gpuremote.client.offering import Steps, upload
from gpuremote.client.waits import Wait
from gpuremote.config import parse_address
from gpuremote.errors import SessionClosed
from gpuremote.memory.host import HostArray, host_array
from gpuremote.ops.creation import arange_length
from gpuremote.ops.meta import Meta, check_dtype
from gpuremote.wire.batch import Op

__all__ = ["Device"]

A = TypeVar("A", bound=RemoteArray)


class Device(Generic[A]):
    """One device of a session.

    Made by the session; its waiting methods (``put``, ``synchronize``) are in the subclass that
    fits the session.

    Attributes
    ----------
    index : int
        Position in ``session.devices``.
    kind : str
        ``"cpu"``, ``"cuda"``, ...
    name : str
        ``"cpu:0@host:port"``.
    memory_bytes : int
        Memory of the device (not what this session may use of it).
    """

    def __init__(
        self, core: Core, array_type: type[A], index: int, facts: Mapping[str, Any], server: str
    ) -> None:
        self._core = core
        self._array_type = array_type
        self.index = index
        self.kind = str(facts.get("kind", "unknown"))
        self.model = str(facts.get("name", ""))
        self.memory_bytes = int(facts.get("memory", 0))
        self.name = f"{self.kind}:{index}@{server}"

    def __repr__(self) -> str:
        return self.name

    # -- arrays out of nothing ------------------------------------------------------------------

    def empty(self, shape: int | Shape, dtype: npt.DTypeLike = np.float64) -> A:
        """An array whose values are whatever lies in that memory."""
        return self._filled("empty", shape, dtype)

    def zeros(self, shape: int | Shape, dtype: npt.DTypeLike = np.float64) -> A:
        return self._filled("zeros", shape, dtype)

    def ones(self, shape: int | Shape, dtype: npt.DTypeLike = np.float64) -> A:
        return self._filled("ones", shape, dtype)

    def full(self, shape: int | Shape, value: Any, dtype: npt.DTypeLike | None = None) -> A:
        params: dict[str, Any] = {"shape": _shape(shape)}
        if dtype is not None:
            params["dtype"] = _wire(dtype)
        return self._create("full", params, (value,))

    def arange(
        self,
        start: float,
        stop: float | None = None,
        step: float = 1,
        dtype: npt.DTypeLike | None = None,
    ) -> A:
        """Evenly spaced values, as ``numpy.arange``."""
        if stop is None:
            start, stop = 0, start
        params: dict[str, Any] = {"length": arange_length(start, stop, step)}
        if dtype is not None:
            params["dtype"] = _wire(dtype)
        return self._create("arange", params, (start, stop, step))

    def linspace(self, start: float, stop: float, num: int = 50, endpoint: bool = True) -> A:
        return self._create("linspace", {"num": num, "endpoint": endpoint}, (start, stop))

    def eye(
        self, n: int, m: int | None = None, k: int = 0, dtype: npt.DTypeLike | None = None
    ) -> A:
        params: dict[str, Any] = {"n_rows": n, "n_cols": n if m is None else m, "k": k}
        if dtype is not None:
            params["dtype"] = _wire(dtype)
        return self._create("eye", params)

    def random_uniform(self, shape: int | Shape, seed: int, dtype: npt.DTypeLike = np.float64) -> A:
        """Numbers from [0, 1); the same for the same seed and backend."""
        return self._create(
            "random_uniform", {"shape": _shape(shape), "dtype": _wire(dtype)}, (seed,)
        )

    def random_normal(self, shape: int | Shape, seed: int, dtype: npt.DTypeLike = np.float64) -> A:
        """Standard normal numbers; the same for the same seed and backend."""
        return self._create(
            "random_normal", {"shape": _shape(shape), "dtype": _wire(dtype)}, (seed,)
        )

    def _filled(self, name: str, shape: int | Shape, dtype: npt.DTypeLike) -> A:
        return self._create(name, {"shape": _shape(shape), "dtype": _wire(dtype)})

    def _create(self, name: str, params: Mapping[str, Any], scalars: tuple[Any, ...] = ()) -> A:
        return issue.create(self._core, self._array_type, name, self.index, params, scalars)

    # -- uploads and copies ---------------------------------------------------------------------

    def _upload(self, value: Any, dtype: npt.DTypeLike | None = None) -> tuple[A, Wait | None]:
        return self._upload_host(value, self._host_array(value, dtype))

    def _upload_host(
        self, value: Any, host: HostArray, *, lent: bool = False
    ) -> tuple[A, Wait | None]:
        staged = self._staged(value, host)
        wait = None
        if staged is None:
            array, wait = self._put(host, lent=lent)
        else:
            if staged is not host.view:
                self._core.fill(staged, host.view)
            array = self._put_staged(value, host, staged)
        self._note(value, host, array)
        return array, wait

    def _note(self, value: Any, host: HostArray, array: A) -> None:
        """Such a value was uploaded: the next one may take fewer steps."""
        if type(value) is np.ndarray and value.shape == host.shape and value.dtype == host.dtype:
            self._core.note_kind(array._meta)

    def _given(self, value: Any) -> A | None:
        """Upload an array of ``session.empty`` by giving it away; None: it can't be."""
        core = self._core
        given = core.give(value, self.index)
        return None if given is None else self._array_type(core, *given)

    def _host_array(self, value: Any, dtype: npt.DTypeLike | None) -> HostArray:
        host = host_array(value, dtype)
        if host.copied:
            self._core.stats.payload_copied += host.copied
        return host

    def _put(
        self, host: HostArray, *, keep: bool = False, lent: bool = False
    ) -> tuple[A, Wait | None]:
        core = self._core
        meta = core.metas.get(host.shape, host.dtype, self.index)
        number, wait = core.put(meta, host.view, keep=keep, lent=lent)
        return self._array_type(core, number, meta), wait

    def _staged(self, value: Any, host: HostArray) -> memoryview | None:
        """Memory that the server sees too, to be filled with the bytes of ``host`` (its own view
        if they lie there already); None if there is none, or it does not pay."""
        core = self._core
        connection = core.peer.connection
        if connection is None or not connection.shared or core.inlines(host.view.nbytes):
            return None
        owns = type(value) is not np.ndarray or value.base is None  # as most do
        if not owns and core.gives(host.view) and _alone(value):
            return host.view
        return core.allocate(host.view.nbytes, shared=True)

    def _put_staged(self, value: Any, host: HostArray, staged: memoryview) -> A:
        """Upload what ``_staged`` said, which is filled by now."""
        if staged is host.view:
            return self._put_given(value, staged)
        core = self._core
        meta = core.metas.get(host.shape, host.dtype, self.index)
        return self._array_type(core, core.put_staged(meta, staged), meta)

    def _put_given(self, value: npt.NDArray[Any], block: memoryview) -> A:
        """Upload an array that lies in ``block``; it is the device's from now on."""
        core = self._core
        meta = core.metas.get(value.shape, value.dtype, self.index)
        return self._array_type(core, core.give_block(value, meta, block), meta)

    def _offering(self, hosts: Sequence[HostArray]) -> Steps[A] | None:
        """The steps of an upload of which the server may have bytes already; None: they are not
        looked for."""
        core = self._core
        connection = core.peer.connection
        if any(core.known.applies(host.view.nbytes, connection) for host in hosts):
            return upload(core, self.index, hosts, self._array)
        return None

    def _host_arrays(self, values: Any, dtype: npt.DTypeLike | None) -> list[HostArray]:
        return [self._host_array(value, dtype) for value in values]

    def _upload_many(self, hosts: Sequence[HostArray]) -> tuple[list[A], Wait | None]:
        if not hosts:
            return [], None
        core = self._core
        metas = [core.metas.get(host.shape, host.dtype, self.index) for host in hosts]
        views = [host.view for host in hosts]
        numbers, wait = core.put_many(list(zip(metas, views, strict=True)))
        make = self._array_type
        return [make(core, n, meta) for n, meta in zip(numbers, metas, strict=True)], wait

    def _upload_small(self, value: npt.NDArray[Any]) -> A:
        """An index array: small ones travel in the batch; a large one has to be put first."""
        array, wait = self._upload(value)
        if wait is not None:
            self._finish_upload(wait)
        return array

    def _finish_upload(self, wait: Wait) -> None:
        raise NotImplementedError

    def _array(self, number: int, host: HostArray) -> A:
        meta = self._core.metas.get(host.shape, host.dtype, self.index)
        return self._array_type(self._core, number, meta)

    def _take_copy(self, source: RemoteArray) -> A:
        """A copy of an array of any session on this device; see ``RemoteArray.copy_to``."""
        return self._copy_of(source._core, source._id, source._meta)

    def _copy_of(self, other: Core, handle: int, meta: Meta) -> A:
        """The same of a handle of the session ``other``."""
        core = self._core
        if other is core:
            number = core.record(Op.COPY, handle, self.index, name="copy_to")
        else:
            number = self._from_other_session(other, handle, meta)
        return self._array_type(core, number, core.metas.get(meta.shape, meta.dtype, self.index))

    def _from_other_session(self, other: Core, handle: int, meta: Meta) -> int:
        core = self._core
        if other.dead is not None:
            raise SessionClosed(
                f"the array that is to be copied is gone with its session: {other.dead}",
                op="copy_to",
                peer=other.peer_name,
            )
        ticket = secrets.token_bytes(24)
        blob = [list(meta.shape), meta.wire_dtype, self.index, ticket]
        number = core.record(Op.EXPECT, name="copy_to", blob=blob)
        host, port = parse_address(core.advertised)
        target = {"host": host, "port": port, "session": core.session, "ticket": ticket}
        if core.encrypted:
            target["tls"] = True
        sender = other.record(Op.SEND_TO, handle, name="copy_to", blob=target)
        other.link_failure(sender, core, number)
        # Neither side is waited for, and each must know before the other's bytes can come.
        core.flush()
        other.flush()
        return number


def _alone(value: npt.NDArray[Any]) -> bool:
    """Whether no other array could still write to the memory of ``value``: beside it only this call
    refers to what it is made from."""
    return sys.getrefcount(value.base) <= 2


def _shape(shape: int | Shape) -> Shape:
    if isinstance(shape, (tuple, list)):
        return tuple(int(length) for length in shape)
    return (operator.index(shape),)


def _wire(dtype: npt.DTypeLike) -> str:
    return check_dtype(dtype).str.lstrip("<|=")
