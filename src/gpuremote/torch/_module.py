"""``torch.remote``: what torch asks of every kind of device."""

from __future__ import annotations

from typing import Any

import torch

from gpuremote.torch import _homes, _random

__all__ = ["RemoteModule"]


class _Device:
    """A context in which a remote device is the current one; there is one to choose from."""

    def __init__(self, device: Any = None) -> None:
        self.index = _index(device)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


def _index(device: Any = None) -> int:
    if device is None:
        return 0
    index = device if isinstance(device, int) else (torch.device(device).index or 0)
    if index > 0:
        raise RuntimeError(
            f"remote:{index} needs the part of gpuremote written in C++, which there is not "
            "yet (torch's engine for gradients knows one device of a kind that is written in "
            "Python); use remote:0"
        )
    return index


class RemoteModule:
    """Functions as in ``torch.cuda``."""

    device = _Device

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def init(self) -> None:
        """Nothing to do: sessions open with the first op."""

    def _is_in_bad_fork(self) -> bool:
        return _homes.is_forked()

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        _index(device)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        """Wait until everything issued has run; raises what failed."""
        _homes.home(_index(device)).session.synchronize()

    def get_device_name(self, device: Any = None) -> str:
        place = _homes.home(_index(device))
        return f"{place.session.devices[place.number].model} ({place.session.devices[0].name})"

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
        """What the server counts of this session."""
        return _homes.home(_index(device)).session.server_stats()

    def empty_cache(self) -> None:
        """Nothing to do: the server keeps no memory that it has been given back."""

    # -- random numbers -------------------------------------------------------------------------

    def manual_seed(self, seed: int) -> None:
        """Seed the generator of the current device."""
        _random.seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        _random.seed(seed)

    def get_rng_state(self, device: Any = "remote") -> torch.Tensor:
        """State of the device's generator, on the host; waits for it."""
        return _random.get_state(_homes.home(_index(device)))

    def set_rng_state(self, state: torch.Tensor, device: Any = "remote") -> None:
        _random.set_state(_homes.home(_index(device)), state)
