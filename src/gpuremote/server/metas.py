"""Shapes and dtypes as a client names them."""

from __future__ import annotations

from typing import Any

from gpuremote.errors import ProtocolError, ShapeError
from gpuremote.ops.meta import Meta, MetaTable, check_dtype
from gpuremote.wire import caps

__all__ = ["ToldMetas"]


class ToldMetas:
    """Metas by what a client says of an array; what was found to be right is remembered.

    Parameters
    ----------
    table : MetaTable
        Where they are interned.
    devices : int
        Number of devices that there are.
    """

    def __init__(self, table: MetaTable, devices: int) -> None:
        self._table = table
        self._devices = devices
        self._known: dict[tuple[Any, ...], Meta] = {}

    def get(self, shape: Any, dtype: Any, device: Any) -> Meta:
        """The meta of an array.

        Raises
        ------
        ProtocolError
            These are no shape, name of a dtype and number of a device.
        ShapeError
            It has more elements than any array.
        DTypeError
        """
        if type(shape) is list and type(dtype) is str and type(device) is int:
            try:
                return self._known[tuple(shape), dtype, device]  # nearly every one
            except (KeyError, TypeError):
                pass
        if (
            not isinstance(shape, list)
            or len(shape) > 64
            or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape)
            or not isinstance(dtype, str)
            or type(device) is not int
            or not 0 <= device < self._devices
        ):
            raise ProtocolError("malformed shape, dtype or device")
        total = 1
        for length in shape:
            total *= max(length, 1)
        if total >= 1 << 58:
            raise ShapeError(f"shape {tuple(shape)} has too many elements")
        meta = self._table.get(tuple(shape), check_dtype(dtype), device)
        if len(self._known) >= caps.MAX_METAS:
            self._known.clear()
        self._known[tuple(shape), dtype, device] = meta
        return meta
