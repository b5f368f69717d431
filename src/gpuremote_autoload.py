"""Makes the device ``remote`` known to PyTorch where ``GPUREMOTE_URL`` says where it is.

Called at the end of ``import torch``, by everybody who has this package. A module of its own,
because it costs nothing where the variable is not set: not even the import of ``gpuremote``.
"""

import os


def load() -> None:
    """Entry point of the group ``torch.backends``."""
    if os.environ.get("GPUREMOTE_URL"):
        import gpuremote.torch  # noqa: F401  (registers)
