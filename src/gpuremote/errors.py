"""Every error the library raises, in one tree.

::

    GpuRemoteError
    ├── ConfigError (ValueError)
    │   ├── InvalidURL
    │   └── BuildFailed
    ├── TransportError (ConnectionError)
    │   ├── ConnectionFailed
    │   ├── ConnectionLost
    │   ├── NotAGpuRemoteServer
    │   ├── UnsupportedVersion
    │   └── TransportUnavailable
    ├── AuthenticationFailed (PermissionError)
    ├── HandshakeTimeout (TimeoutError)
    ├── ServerUnavailable (ConnectionError)
    │   ├── ServerDraining
    │   └── ServerBusy
    ├── SessionLost (ConnectionError)
    │   └── WorkerDied
    ├── SessionClosed
    ├── ProtocolError
    │   └── LimitExceeded
    ├── OpError
    │   ├── UnsupportedOp
    │   ├── ShapeError (ValueError)
    │   │   └── AxisError (IndexError)
    │   ├── DTypeError (TypeError)
    │   ├── DeviceMismatch (ValueError)
    │   ├── IndexOutOfBounds (IndexError)
    │   ├── InvalidHandle
    │   ├── LinearAlgebraError (ArithmeticError, ValueError)
    │   ├── OpFailed (RuntimeError)
    │   └── OpCancelled
    ├── OutOfDeviceMemory (MemoryError)
    ├── InvalidBuffer (ValueError)
    ├── ImplicitTransfer (TypeError)
    ├── DeadlineExceeded (TimeoutError)
    ├── PeerCopyFailed (ConnectionError)
    └── InternalError

Each class has a stable integer ``code`` (what travels on the wire) and says whether the same
call may be tried again (``retryable``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

__all__ = [
    "AuthenticationFailed",
    "AxisError",
    "BuildFailed",
    "ConfigError",
    "ConnectionFailed",
    "ConnectionLost",
    "DTypeError",
    "DeadlineExceeded",
    "DeviceMismatch",
    "GpuRemoteError",
    "HandshakeTimeout",
    "ImplicitTransfer",
    "IndexOutOfBounds",
    "InternalError",
    "InvalidBuffer",
    "InvalidHandle",
    "InvalidURL",
    "LimitExceeded",
    "LinearAlgebraError",
    "NotAGpuRemoteServer",
    "OpCancelled",
    "OpError",
    "OpFailed",
    "OutOfDeviceMemory",
    "PeerCopyFailed",
    "ProtocolError",
    "ServerBusy",
    "ServerDraining",
    "ServerUnavailable",
    "SessionClosed",
    "SessionLost",
    "ShapeError",
    "TransportError",
    "TransportUnavailable",
    "UnsupportedOp",
    "UnsupportedVersion",
    "WorkerDied",
    "error_from_wire",
]


class GpuRemoteError(Exception):
    """Root of every error of this library.

    Parameters
    ----------
    message : str
        What happened and what to do about it.
    op : str, optional
        Name of the op that failed, as in the catalogue.
    device : str, optional
        Device on which it failed, such as ``"cpu:0@node1:7700"``.
    peer : str, optional
        Address of the other end.
    origin : str, optional
        Where the program issued the op (``file:line in function`` lines).

    Attributes
    ----------
    code : int
        Stable number of the class; what travels on the wire.
    retryable : bool
        Whether the same call may succeed when it is made again.
    """

    code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        op: str | None = None,
        device: str | None = None,
        peer: str | None = None,
        origin: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.op = op
        self.device = device
        self.peer = peer
        self.origin = origin

    def __str__(self) -> str:
        where = [
            f"{name} {value}"
            for name, value in (("op", self.op), ("device", self.device), ("peer", self.peer))
            if value
        ]
        text = f"{self.message} [{', '.join(where)}]" if where else self.message
        return f"{text}\nissued at:\n{self.origin}" if self.origin else text


class ConfigError(GpuRemoteError, ValueError):
    """A setting or an argument that is out of its range."""

    code = 10


class InvalidURL(ConfigError):
    """A device URL that can't be understood, or with an option that does not exist."""

    code = 11


class BuildFailed(ConfigError):
    """The part of ``gpuremote.torch`` in C++ could not be built here, or is not to be trusted."""

    code = 12


class TransportError(GpuRemoteError, ConnectionError):
    """The path to the peer: it could not be opened, or it broke."""

    code = 100
    retryable = True


class ConnectionFailed(TransportError):
    """The peer could not be reached: refused, unreachable, or no such host."""

    code = 101


class ConnectionLost(TransportError):
    """An open connection broke. Inside a session this leads to a resume, not to the caller.

    Attributes
    ----------
    deliberate : bool
        This side ended it, as nothing else takes lent memory back at once; the path was all right.
    """

    code = 102
    deliberate = False


class NotAGpuRemoteServer(TransportError):
    """Something answers at that address, and it does not speak this protocol."""

    code = 103
    retryable = False


class AuthenticationFailed(GpuRemoteError, PermissionError):
    """One end did not prove that it knows the token that the other one wants."""

    code = 106


class UnsupportedVersion(TransportError):
    """No protocol version that both ends speak."""

    code = 104
    retryable = False


class TransportUnavailable(TransportError):
    """The transport that was required can't be had.

    Attributes
    ----------
    reasons : Mapping[str, str]
        For each transport that was looked at, why it was not chosen.
    """

    code = 105
    retryable = False

    def __init__(
        self,
        message: str = "",
        *,
        reasons: Mapping[str, str] | None = None,
        op: str | None = None,
        device: str | None = None,
        peer: str | None = None,
        origin: str | None = None,
    ) -> None:
        super().__init__(message, op=op, device=device, peer=peer, origin=origin)
        self.reasons = dict(reasons or {})


class HandshakeTimeout(GpuRemoteError, TimeoutError):
    """The peer accepted the connection and then did not finish the handshake in time."""

    code = 110
    retryable = True


class ServerUnavailable(GpuRemoteError, ConnectionError):
    """The server answered and does not take the session now."""

    code = 120
    retryable = True


class ServerDraining(ServerUnavailable):
    """The server is shutting down: it finishes its sessions and takes no new one."""

    code = 121


class ServerBusy(ServerUnavailable):
    """The server is at its limit of sessions."""

    code = 122


class SessionLost(GpuRemoteError, ConnectionError):
    """The session is gone: its grace period passed, or the server no longer knows it."""

    code = 130


class WorkerDied(SessionLost):
    """The session's worker process ended (killed, crashed, out of memory)."""

    code = 131


class SessionClosed(GpuRemoteError):
    """The session was closed by this program before the call."""

    code = 132


class ProtocolError(GpuRemoteError):
    """The peer sent bytes that the protocol does not allow."""

    code = 140


class LimitExceeded(ProtocolError):
    """A size in a message is over its cap."""

    code = 141


class OpError(GpuRemoteError):
    """An op failed. Raised at the next wait for what depends on it."""

    code = 200


class UnsupportedOp(OpError):
    """An op that is not in the catalogue, or that the server's backend lacks."""

    code = 201


class ShapeError(OpError, ValueError):
    """Shapes that the op refuses."""

    code = 202


class DTypeError(OpError, TypeError):
    """A dtype that the op, or the wire, refuses."""

    code = 203


class DeviceMismatch(OpError, ValueError):
    """Operands that live on different devices or in different sessions."""

    code = 204


class IndexOutOfBounds(OpError, IndexError):
    """An index outside the array."""

    code = 205


class AxisError(ShapeError, IndexError):
    """An axis that the array does not have."""

    code = 210


class InvalidHandle(OpError):
    """A handle that was freed, or that never existed in this session."""

    code = 206


class LinearAlgebraError(OpError, ArithmeticError, ValueError):
    """A decomposition that did not converge, or a singular matrix."""

    code = 207


class OpFailed(OpError, RuntimeError):
    """The backend raised while it ran the op."""

    code = 208


class OpCancelled(OpError):
    """What the op waited for was cancelled by this program."""

    code = 209


class OutOfDeviceMemory(GpuRemoteError, MemoryError):
    """The allocation does not fit in what the session may use, or in the device."""

    code = 220
    retryable = True


class InvalidBuffer(GpuRemoteError, ValueError):
    """A buffer that can't be used as asked: read-only, not contiguous, or of another size."""

    code = 221


class ImplicitTransfer(GpuRemoteError, TypeError):
    """Something would have moved an array between host and device without being asked."""

    code = 222


class DeadlineExceeded(GpuRemoteError, TimeoutError):
    """The call's deadline passed; the session goes on."""

    code = 230
    retryable = True


class PeerCopyFailed(GpuRemoteError, ConnectionError):
    """A copy from one server to another did not come through."""

    code = 240
    retryable = True


class InternalError(GpuRemoteError):
    """A bug in gpuremote. Please report it with its text."""

    code = 999


def _tree(root: type[GpuRemoteError]) -> dict[int, type[GpuRemoteError]]:
    classes = {root.code: root}
    for child in root.__subclasses__():
        classes.update(_tree(child))
    return classes


_BY_CODE = _tree(GpuRemoteError)


def error_from_wire(
    code: int,
    message: str,
    *,
    op: str | None = None,
    device: str | None = None,
    peer: str | None = None,
    origin: str | None = None,
) -> GpuRemoteError:
    """Build the error that a wire code names; a code that is not known gives the root class."""
    cls = _BY_CODE.get(code, GpuRemoteError)
    return cls(message, op=op, device=device, peer=peer, origin=origin)
