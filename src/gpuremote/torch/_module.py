"""``torch.remote``: what torch asks of every kind of device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from gpuremote.torch import _homes, _random
from gpuremote.torch._homes import Home, current
from gpuremote.torch._tier import native, needs_native
from gpuremote.wire.batch import ALL_STREAMS, Op

__all__ = ["RemoteModule", "counted"]


class _Device:
    """A context in which a remote device is the current one of this thread."""

    def __init__(self, device: Any = None) -> None:
        self.index = _index(device)
        self._before = 0

    def __enter__(self) -> None:
        self._before = _exchange(self.index)

    def __exit__(self, *exception: object) -> None:
        _exchange(self._before)


def _exchange(index: int) -> int:
    """Make a device the current one; the one before."""
    return 0 if native is None else int(native.device(index))


def _index(device: Any = None) -> int:
    if device is None:
        return current()
    index = device if isinstance(device, int) else torch.device(device).index
    if index is None:
        return current()
    if index > 0 and native is None:
        raise RuntimeError(needs_native(f"remote:{index}"))
    return index


def counted(place: Home) -> dict[str, Any]:
    """What the server counts of a device's session, when everything issued so far has run."""
    core = place.core
    core.wait(core.ask(Op.SYNC, ALL_STREAMS, kind="stats"))
    return place.session.server_stats()


class RemoteModule:
    """Functions as in ``torch.cuda``."""

    device = _Device

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def init(self) -> None:
        """Nothing to do: sessions open with the first op."""

    def _lazy_init(self) -> None:
        """As :meth:`init`. Without it ``torch.accelerator.synchronize`` of torch before 2.13 takes
        the device for one that nothing was done on."""

    def _is_in_bad_fork(self) -> bool:
        return _homes.is_forked()

    def device_count(self) -> int:
        """How many there are at the servers; opens the sessions. 0 in a process that was forked
        from one that uses them."""
        if _homes.is_forked():
            return 0
        _homes.home(0)
        return len(_homes.opened()) if native is not None else 1

    def current_device(self) -> int:
        return current()

    def set_device(self, device: Any) -> None:
        _exchange(_index(device))

    # -- streams: each device does what it is told in order --------------------------------------

    if native is not None:
        Stream = torch.Stream
        Event = torch.Event

        def current_stream(self, device: Any = None) -> torch.Stream:
            with _Device(device):
                return torch.accelerator.current_stream()

        default_stream = current_stream

        def stream(self, stream: Any) -> Any:
            """A context in which ``stream`` is the current one."""
            return contextlib.nullcontext() if stream is None else stream

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        """Wait until everything issued has run; raises what failed."""
        _homes.home(_index(device)).session.synchronize()

    def get_device_name(self, device: Any = None) -> str:
        place = _homes.home(_index(device))
        found = place.session.devices[place.number]
        return f"{found.model} ({found.name})"

    # -- memory ---------------------------------------------------------------------------------

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes of device memory that this session holds; waits for the server to say."""
        return int(self.memory_stats(device)["memory_used"])

    def max_memory_allocated(self, device: Any = None) -> int:
        """The most that it held at a time, in bytes."""
        return int(self.memory_stats(device)["memory_peak"])

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Bytes that this session may still use, and may use in all."""
        found = self.memory_stats(device)
        return found["memory_limit"] - found["memory_used"], found["memory_limit"]

    def memory_stats(self, device: Any = None) -> dict[str, Any]:
        """What the server counts of this session, when everything issued so far has run."""
        return counted(_homes.home(_index(device)))

    def empty_cache(self) -> None:
        """Nothing to do: the server keeps no memory that it has been given back."""

    # -- random numbers -------------------------------------------------------------------------

    def manual_seed(self, seed: int) -> None:
        """Seed the generator of the current device."""
        _random.seed_one(_homes.home(), seed)

    def manual_seed_all(self, seed: int) -> None:
        _random.seed(seed)

    def get_rng_state(self, device: Any = "remote") -> torch.Tensor:
        """State of the device's generator, on the host; waits for it."""
        return _random.get_state(_homes.home(_index(device)))

    def set_rng_state(self, state: torch.Tensor, device: Any = "remote") -> None:
        _random.set_state(_homes.home(_index(device)), state)
