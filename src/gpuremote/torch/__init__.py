"""PyTorch on remote devices: ``torch.device("remote")``.

>>> import torch, gpuremote.torch
>>> model = torch.nn.Linear(4, 2).to("remote")  # doctest: +SKIP

The devices are those of the server at ``GPUREMOTE_URL``, or at the URL given to :func:`connect`;
without either one starts on this machine. Ops return at once. What waits is asking for a value:
``item()``, ``cpu()``, ``print``, ``bool()`` and the like.
"""

from gpuremote.torch._arrays import as_array, as_tensor, session
from gpuremote.torch._capture import Captured, capture
from gpuremote.torch._homes import close, connect
from gpuremote.torch._profile import Profile, profile
from gpuremote.torch._registration import allow_ops, register
from gpuremote.torch._weights import load_file

__all__ = [
    "Captured",
    "Profile",
    "allow_ops",
    "as_array",
    "as_tensor",
    "capture",
    "close",
    "connect",
    "load_file",
    "profile",
    "register",
    "session",
]

register()
