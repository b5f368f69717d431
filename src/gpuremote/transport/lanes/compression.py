"""Lossless compression of payload on slow ways: which libraries are there, and when it is worth it.

The libraries are optional (``pip install gpuremote[compression]``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final, Protocol

from gpuremote.errors import ProtocolError

__all__ = [
    "CODECS",
    "GAIN",
    "Codec",
    "Rule",
    "agree",
    "available",
    "codec_named",
    "codec_numbered",
    "wanted_codecs",
]

CODECS: Final = ("zstd", "lz4")
"""Best first."""
NUMBERS: Final = {"zstd": 1, "lz4": 2}
"""On the wire; 0 is raw."""
GAIN: Final = 0.9
"""Part of its size that a compressed piece may have; a larger one goes out as it is."""
LEVEL: Final = 1
MAX_WINDOW: Final = 8 << 20
"""Bytes of memory that zstd may take to decompress, apart from the result."""
_MODULES: Final = {"zstd": "zstandard", "lz4": "lz4.block"}
_PACKAGES: Final = {"zstd": "zstandard", "lz4": "lz4"}


class Codec(Protocol):
    """One library.

    Attributes
    ----------
    name : str
    number : int
        On the wire.
    """

    name: str
    number: int

    def compress(self, data: memoryview) -> bytes: ...

    def decompress(self, packed: memoryview, into: memoryview) -> int:
        """Fill ``into``, exactly; the bytes of it that were copied there.

        Raises
        ------
        ProtocolError
            What came is not that many bytes, compressed.
        """


class _Zstd:
    name = "zstd"
    number = NUMBERS["zstd"]

    def __init__(self) -> None:
        self._module: Any = importlib.import_module(_MODULES[self.name])
        self._compressor = self._module.ZstdCompressor(level=LEVEL)
        self._decompressor = self._module.ZstdDecompressor(max_window_size=MAX_WINDOW)

    def compress(self, data: memoryview) -> bytes:
        packed: bytes = self._compressor.compress(data)
        return packed

    def decompress(self, packed: memoryview, into: memoryview) -> int:
        filled = 0
        try:
            with self._decompressor.stream_reader(packed) as reader:
                while filled < len(into) and (count := reader.readinto(into[filled:])):
                    filled += count
                exact = filled == len(into) and not reader.read(1)
        except self._module.ZstdError as error:
            raise ProtocolError(f"a piece that zstd can't decompress: {error}") from None
        if not exact:
            raise _wrong_size(len(into))
        return 0


class _Lz4:
    name = "lz4"
    number = NUMBERS["lz4"]

    def __init__(self) -> None:
        self._module: Any = importlib.import_module(_MODULES[self.name])

    def compress(self, data: memoryview) -> bytes:
        packed: bytes = self._module.compress(data, store_size=False)
        return packed

    def decompress(self, packed: memoryview, into: memoryview) -> int:
        try:
            found: bytes = self._module.decompress(packed, uncompressed_size=len(into))
        except self._module.LZ4BlockError as error:
            raise ProtocolError(f"a piece that lz4 can't decompress: {error}") from None
        if len(found) != len(into):
            raise _wrong_size(len(into))
        into[:] = found
        return len(found)


def _wrong_size(expected: int) -> ProtocolError:
    return ProtocolError(f"a compressed piece does not have the {expected} bytes that it should")


_MAKERS: Final[dict[str, Callable[[], Codec]]] = {"zstd": _Zstd, "lz4": _Lz4}


def available(name: str) -> bool:
    """Whether the library of a codec is installed here."""
    try:
        importlib.import_module(_MODULES[name])
    except ImportError:
        return False
    return True


def codec_named(name: str) -> Codec:
    """The codec, with a state of its own: for one direction of one connection.

    Raises
    ------
    ImportError
    """
    return _MAKERS[name]()


def codec_numbered(number: int, known: Codec | None) -> Codec:
    """The codec that a piece names.

    Raises
    ------
    ProtocolError
        It is not the one that was agreed on.
    """
    if known is None or known.number != number:
        raise ProtocolError(f"a piece with compression {number}, which was not agreed on")
    return known


def wanted_codecs(wish: str) -> tuple[list[str], str]:
    """What this side can use of what a program asks for, and for people why not more.

    Parameters
    ----------
    wish : {"auto", "off", "lz4", "zstd"}
    """
    if wish == "off":
        return [], "compression is off"
    names = CODECS if wish == "auto" else (wish,)
    found = [name for name in names if available(name)]
    if found:
        return found, ""
    missing = " and ".join(_PACKAGES[name] for name in names)
    are = "are" if len(names) > 1 else "is"
    return [], f"no compression: {missing} {are} not installed here (gpuremote[compression])"


def agree(wanted: list[str], there: list[str]) -> tuple[str, str]:
    """The first codec that both ends have, and for people why there is none."""
    for name in wanted:
        if name in there:
            return name, ""
    missing = " or ".join(_PACKAGES[name] for name in wanted)
    return "", f"no compression: {missing} is not installed at the server"


class Rule:
    """Whether to compress the next piece, from what was measured on this connection.

    A byte costs ``1 / rate`` seconds to send raw, where ``rate`` is what the lanes take when they
    are what is waited for. Compressed it costs the compressor's time or ``ratio / rate``, whichever
    is more, as one piece is compressed while the others are under way.

    Parameters
    ----------
    always : bool
        The program asked for it: each piece is tried.
    rate : float or None
        Bytes per second to begin with.
    delay : float
        Seconds of round trip.
    """

    WEIGHT: Final = 0.25
    """Of the latest figure in a moving average."""
    SAMPLE: Final = 32
    """Pieces in a row that are sent raw before one is tried; up to eight times as many where that
    is of no use."""
    MARGIN: Final = 0.9
    """Compressing has to take less than this part of the time of sending raw."""

    def __init__(
        self, *, always: bool = False, rate: float | None = None, delay: float = 0.0
    ) -> None:
        self.always = always
        self.rate = rate
        self.delay = delay
        self.seconds: float | None = None
        """That compressing a raw byte takes."""
        self.ratio: float | None = None
        self._pause = self.SAMPLE
        self._skipped = self.SAMPLE  # the first piece is a sample

    @property
    def worth_it(self) -> bool | None:
        """Whether compressing pays; None while that is not known."""
        if self.rate is None or self.seconds is None or self.ratio is None:
            return None
        compressed = max(self.seconds, self.ratio / self.rate)
        return compressed < self.MARGIN / self.rate

    def try_next(self) -> bool:
        """Whether to compress the next piece."""
        if self.always or self.worth_it:
            return True
        if self.rate is None:
            return False  # a fast way is never held up
        self._skipped += 1
        if self._skipped < self._pause:
            return False
        self._skipped = 0
        return True

    def compressed(self, raw: int, packed: int, seconds: float) -> None:
        """A piece was compressed, and it took that long."""
        self.seconds = self._mean(self.seconds, seconds / raw)
        self.ratio = self._mean(self.ratio, min(1.0, packed / raw))
        useful = self.worth_it
        self._pause = self.SAMPLE if useful else min(2 * self._pause, 8 * self.SAMPLE)

    def sent(self, count: int, seconds: float) -> None:
        """The lanes took that many bytes, and more would have been there."""
        if seconds > 0:
            self.rate = self._mean(self.rate, count / seconds)

    def _mean(self, before: float | None, latest: float) -> float:
        return latest if before is None else before + self.WEIGHT * (latest - before)
