"""What ``gpuremote serve`` can be told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gpuremote.errors import ConfigError
from gpuremote.memory.host import host_memory
from gpuremote.server import heap

__all__ = ["CONTENT_CACHE", "ServerOptions"]

CONTENT_CACHE: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Options of a device server.

    Attributes
    ----------
    host, port
        Where to listen; port 0 takes a free one.
    backend : str
        Name in the entry point group ``gpuremote.backends``.
    devices : int
        Logical devices to offer (0: all that the backend has; NumPy: 1).
    memory_limit : int
        Device memory in bytes that one session may hold; 0: 80 % of what the devices have.
    grace : float
        Seconds for which a session outlives a lost connection.
    max_sessions : int
        Sessions at a time; a further one is refused with ``ServerBusy``.
    warm : int
        Worker processes that wait for a session.
    drain : float
        Seconds that sessions get to end after SIGTERM.
    token : bytes
        What clients and other servers have to know; empty: nothing.
    certfile, keyfile : str
        This server's certificate in PEM: whoever connects has to speak TLS. Empty: nobody does.
        Without ``keyfile`` the key is in ``certfile``.
    client_ca : str
        PEM file: clients have to show a certificate that one of these has signed. Empty: none.
    cafile : str
        PEM file: whose certificates are trusted where this server's workers connect to another
        server; empty: ``certfile``, and where there is none the system's.
    allow_ops : tuple of str
        Namespaces of custom torch ops that sessions may run, ``NAME`` or ``NAME=MODULE``.
    allow_kernels : bool
        Sessions may run kernels in CUDA C++ that they bring along.
    weights : str
        Folder with safetensors files that sessions may load; empty: none.
    content_cache : int
        Bytes of uploads that are kept, so that further sessions of the same tenant need not send
        them; 0: none. -1: ``CONTENT_CACHE``, or a sixteenth of the memory if that is less, where
        the server knows who comes (``token``, ``client_ca``); else none.
    advertise : str
        ``HOST:PORT`` by which other servers reach this one; empty: what the client used.
    """

    host: str = "127.0.0.1"
    port: int = 7700
    backend: str = "numpy"
    devices: int = 0
    memory_limit: int = 0
    grace: float = 60.0
    max_sessions: int = 64
    warm: int = 1
    drain: float = 30.0
    advertise: str = ""
    token: bytes = field(default=b"", repr=False)
    certfile: str = ""
    keyfile: str = ""
    client_ca: str = ""
    cafile: str = ""
    allow_ops: tuple[str, ...] = ()
    allow_kernels: bool = False
    weights: str = ""
    content_cache: int = -1

    def __post_init__(self) -> None:
        for name in ("devices", "memory_limit", "grace", "max_sessions", "warm", "drain"):
            if not getattr(self, name) >= 0:  # NaN is neither
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.content_cache < -1:
            raise ConfigError(f"content_cache is {self.content_cache}; it must be 0 or more")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port {self.port} is not in 0..65535")
        for name in ("keyfile", "client_ca"):
            if getattr(self, name) and not self.certfile:
                raise ConfigError(f"{name} is given without certfile")
        if self.weights and not Path(self.weights).is_dir():
            raise ConfigError(f"weights: there is no folder {self.weights}")
        for allowed in self.allow_ops:
            if not re.fullmatch(r"\w+(=[\w.]+)?", allowed):
                raise ConfigError(f"allow_ops: {allowed!r} is neither NAME nor NAME=MODULE")

    @property
    def kept_contents(self) -> int:
        """Bytes of uploads that are kept."""
        if self.content_cache >= 0:
            return self.content_cache
        # Whom a server does not know it can't tell from another one.
        known = bool(self.token or self.client_ca)
        return min(CONTENT_CACHE, host_memory() // 16) if known else 0

    def worker_environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What a worker process finds there: the token, which a command line would show."""
        found = {key: value for key, value in environ.items() if key != "GPUREMOTE_TOKEN"}
        if self.token:
            found["GPUREMOTE_TOKEN"] = self.token.decode()
        # A worker runs ops itself: torch need not look for devices elsewhere when it is loaded.
        found["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        return heap.ENVIRONMENT | found

    def worker_arguments(self) -> list[str]:
        """The command line of a worker process, without its channel."""
        return [
            "--backend",
            self.backend,
            "--devices",
            str(self.devices),
            "--memory-limit",
            str(self.memory_limit),
            "--grace",
            str(self.grace),
            "--certfile",
            self.certfile,
            "--keyfile",
            self.keyfile,
            "--client-ca",
            self.client_ca,
            "--cafile",
            self.cafile or self.certfile,
            "--weights",
            self.weights,
            *(part for allowed in self.allow_ops for part in ("--allow-ops", allowed)),
            *(["--allow-kernels"] if self.allow_kernels else []),
        ]
