"""Weights from safetensors files: of this host, or of one that lies on the server and so never
travels."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from gpuremote.errors import InvalidBuffer
from gpuremote.torch._homes import Home, home
from gpuremote.torch._own import UNKNOWN, issue_own
from gpuremote.torch._storages import form_of, make_tensor
from gpuremote.torch._transfers import download, upload_many
from gpuremote.wire.batch import Op

__all__ = ["load_file"]

Tensor = torch.Tensor
DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Names of the format, see https://github.com/huggingface/safetensors#format."""
MAX_HEADER: Final = 64 << 20
TOGETHER: Final = 64 << 20
"""Bytes of a file that are read, and then sent with one wait."""


class _Entry(NamedTuple):
    """A tensor of a file; ``begin`` and ``nbytes`` count after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def load_file(
    name: str | os.PathLike[str],
    *,
    device: torch.device | str = "remote",
    on_server: bool = False,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on a remote device.

    ``model.load_state_dict(load_file(...), assign=True)`` gives them to a model, also to one that
    was made on the device ``meta`` and so never had memory here.

    Parameters
    ----------
    name : path
        With ``on_server`` the file's name in the folder that the server's operator has allowed
        (``serve --weights``); no weights travel then. Else a file of this host.
    progress : bool
        Show a bar on standard error; on a terminal only.

    Raises
    ------
    InvalidBuffer
        It is no such file.
    OpError
        The server has none of that name, or allows none. Raised here.
    OSError
        The file of this host can't be read.
    """
    place = home(torch.device(device).index)
    if on_server:
        entries = _entries(_header_there(place, str(name)))
        with _bar(entries, progress) as advance:
            return {key: _read(place, str(name), one, advance) for key, one in entries.items()}
    path = Path(name)
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(MAX_HEADER, path.stat().st_size - 8):
            raise InvalidBuffer(f"{path} is no safetensors file")
        entries = _entries(file.read(length))
    room = path.stat().st_size - 8 - length
    if any(one.begin + one.nbytes > room for one in entries.values()):
        raise InvalidBuffer(f"{path} is cut short")
    with _bar(entries, progress) as advance:
        return _send(place, path, 8 + length, entries, advance)


def _entries(header: bytes) -> dict[str, _Entry]:
    try:
        listed = json.loads(header)
        found: dict[str, _Entry] = {}
        for name, facts in listed.items():
            if name == "__metadata__":
                continue
            begin, end = facts["data_offsets"]
            dtype = DTYPES[facts["dtype"]]
            shape = tuple(int(length) for length in facts["shape"])
            found[name] = _Entry(dtype, shape, int(begin), int(end) - int(begin))
            if found[name].nbytes != math.prod(shape) * dtype.itemsize or begin < 0:
                raise ValueError(f"{name} is of another size than it says")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidBuffer(f"the header of a safetensors file makes no sense: {error!r}") from None
    return found


def _send(
    place: Home,
    path: Path,
    start: int,
    entries: Mapping[str, _Entry],
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """Upload what a file has, several tensors with one wait: on a long way each takes a round
    trip."""
    found: dict[str, Tensor] = {}
    for names in _groups(entries):
        read = []
        for one in (entries[name] for name in names):
            # Not mapped: pages that nobody else has can go out while the file is read on.
            raw = np.fromfile(path, np.uint8, one.nbytes, offset=start + one.begin)
            read.append(torch.from_numpy(raw).view(one.dtype).reshape(one.shape))
        found |= zip(names, upload_many(place, read), strict=True)
        advance(sum(entries[name].nbytes for name in names))
    return {
        name: found[name]
        if one.nbytes
        else torch.empty(one.shape, dtype=one.dtype, device=place.device)
        for name, one in entries.items()
    }


def _groups(entries: Mapping[str, _Entry]) -> Iterator[list[str]]:
    """Names of tensors that are not empty, ``TOGETHER`` bytes or one at a time."""
    group: list[str] = []
    nbytes = 0
    for name, one in entries.items():
        if not one.nbytes:
            continue
        if group and nbytes + one.nbytes > TOGETHER:
            yield group
            group, nbytes = [], 0
        group.append(name)
        nbytes += one.nbytes
    if group:
        yield group


def _header_there(place: Home, name: str) -> bytes:
    number = issue_own(place, "gpuremote::weights_header", arguments=[name], size=UNKNOWN)
    core = place.core
    (length,), _ = core.wait(core.ask(Op.META, number, kind="shape"))
    bytes_ = form_of(torch.uint8, (length,), (1,), 0, length)
    return bytes(download(make_tensor(place, number, bytes_)).numpy().tobytes())


def _read(place: Home, name: str, one: _Entry, advance: Callable[[int], None]) -> Tensor:
    if not one.nbytes:
        return torch.empty(one.shape, dtype=one.dtype, device=place.device)
    arguments = [name, ["slot", 0], one.nbytes]
    number = issue_own(
        place,
        "gpuremote::weights_read",
        ("i",),
        (one.begin,),
        arguments=arguments,
        size=one.nbytes,
    )
    advance(one.nbytes)
    stride = torch.empty(one.shape, device="meta").stride()
    made: Tensor = make_tensor(place, number, form_of(one.dtype, one.shape, stride, 0, one.nbytes))
    return made


@contextmanager
def _bar(entries: dict[str, _Entry], wanted: bool) -> Iterator[Callable[[int], None]]:
    if not wanted or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console) as bar:
        task = bar.add_task("", total=sum(one.nbytes for one in entries.values()))
        yield lambda nbytes: bar.advance(task, nbytes)
