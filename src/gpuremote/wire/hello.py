"""The handshake: what both ends say before anything else.

A fixed prefix that no version will change, then msgpack::

    0        4             5             6         8          12
    | "gpuR" | min version | max version | kind    | length   | body ...

Each side says the range of versions that it speaks; the highest common one is used. Keys that
a peer does not know are skipped, so a newer peer can say more.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gpuremote.errors import (
    ConnectionLost,
    GpuRemoteError,
    LimitExceeded,
    NotAGpuRemoteServer,
    ProtocolError,
    UnsupportedVersion,
    error_from_wire,
)
from gpuremote.wire.caps import INLINE_PAYLOAD, MAX_HELLO
from gpuremote.wire.frames import pack_info, unpack_info

__all__ = [
    "MAX_VERSION",
    "MIN_VERSION",
    "Attach",
    "Challenge",
    "Hello",
    "HelloReader",
    "Message",
    "Opened",
    "Proof",
    "Receipt",
    "Refusal",
    "Route",
    "Starting",
    "Welcome",
    "choose_version",
]

MIN_VERSION: Final = 1
MAX_VERSION: Final = 1

_PREFIX: Final = struct.Struct("<4sBBHI")
_MAGIC: Final = b"gpuR"
PREFIX_SIZE: Final = _PREFIX.size


class HelloKind(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    REFUSAL = 3
    CHALLENGE = 4
    """Server: prove that you know the token."""
    PROOF = 5
    """Client, and then server."""
    OPENED = 6
    """Server: the session is there, come for it."""
    ROUTE = 7
    """Client, before TLS: which session this connection is for."""
    ATTACH = 8
    """Client: this connection is a lane beside another one."""
    STARTING = 9
    """Server: a process for the session has to be started first."""


def choose_version(min_version: int, max_version: int) -> int:
    """The highest version that both ends speak.

    Raises
    ------
    UnsupportedVersion
        There is none.
    """
    version = min(max_version, MAX_VERSION)
    if version < max(min_version, MIN_VERSION):
        raise UnsupportedVersion(
            f"the peer speaks protocol versions {min_version} to {max_version}, this side "
            f"{MIN_VERSION} to {MAX_VERSION}; upgrade the older of the two"
        )
    return version


@dataclass(slots=True)
class Receipt:
    """What one side has of the other's reliable messages; sent when a session resumes.

    Attributes
    ----------
    seen : int
        Every message up to this number has arrived, payloads apart.
    partial : list of (int, int)
        Of those, the ones whose payload is incomplete, and how many bytes of it are in place.
    """

    seen: int = 0
    partial: list[tuple[int, int]] = field(default_factory=list)

    def to_wire(self) -> list[Any]:
        return [self.seen, [list(item) for item in self.partial]]

    @classmethod
    def from_wire(cls, value: Any) -> Receipt:
        match value:
            case [int(seen), list(items)] if seen >= 0:
                partial = []
                for item in items:
                    match item:
                        case [int(seq), int(offset)] if 0 < seq <= seen and offset >= 0:
                            partial.append((seq, offset))
                        case _:
                            raise ProtocolError("a receipt with a malformed partial entry")
                return cls(seen, partial)
        raise ProtocolError("a malformed receipt")


@dataclass(slots=True)
class Hello:
    """The client's first words.

    Attributes
    ----------
    software : str
        Name and version, for logs.
    host : str
        Identity of the client's host, to tell whether two processes could share memory.
    session : bytes
        Empty for a new session; else the one to resume, or the one a peer copy belongs to.
    secret : bytes
        Proves that the resuming client is the one that opened the session.
    ticket : bytes
        For a server that brings a peer copy: the ticket that the client gave to both.
    receipt : Receipt
        What the client has of the server's messages.
    transports : dict of str to str
        Each transport that the client could use, with what its probe found.
    memory_limit : int
        Device memory in bytes that the session wants to be held to; 0: the server's limit.
    nonce : bytes
        Random, of a client that has a token: makes the server's proof one for this HELLO only.
    lanes : int
        1 if the client may open further connections beside this one, else 0.
    patient : int
        1 if the client knows what STARTING means, else 0.
    versions : tuple of int
        Lowest and highest protocol version that the sender speaks.
    """

    software: str = ""
    host: str = ""
    session: bytes = b""
    secret: bytes = b""
    ticket: bytes = b""
    receipt: Receipt = field(default_factory=Receipt)
    transports: dict[str, str] = field(default_factory=dict)
    memory_limit: int = 0
    nonce: bytes = b""
    lanes: int = 0
    patient: int = 0
    versions: tuple[int, int] = (MIN_VERSION, MAX_VERSION)

    def encode(self) -> bytes:
        body = {
            "software": self.software,
            "host": self.host,
            "session": self.session,
            "secret": self.secret,
            "ticket": self.ticket,
            "receipt": self.receipt.to_wire(),
            "transports": self.transports,
            "memory_limit": self.memory_limit,
            "nonce": self.nonce,
            "lanes": self.lanes,
            "patient": self.patient,
        }
        return _frame(HelloKind.HELLO, body, self.versions)

    @classmethod
    def decode(cls, body: Mapping[str, Any], versions: tuple[int, int]) -> Hello:
        return cls(
            software=_get(body, "software", str, ""),
            host=_get(body, "host", str, ""),
            session=_get(body, "session", bytes, b""),
            secret=_get(body, "secret", bytes, b""),
            ticket=_get(body, "ticket", bytes, b""),
            receipt=Receipt.from_wire(body.get("receipt", [0, []])),
            transports=_texts(body, "transports"),
            memory_limit=_get(body, "memory_limit", int, 0),
            nonce=_get(body, "nonce", bytes, b""),
            lanes=_get(body, "lanes", int, 0),
            patient=_get(body, "patient", int, 0),
            versions=versions,
        )


@dataclass(slots=True)
class Welcome:
    """The server takes the session (or the resumed one, or the peer copy).

    Attributes
    ----------
    devices : list of dict
        Each device: ``kind``, ``name``, ``memory`` in bytes.
    grace : float
        Seconds for which the session outlives a lost connection.
    window : int
        Message bytes that the client may send before the first ACK.
    choice : dict
        The transport chosen, and every candidate with its reason.
    contents : int
        1 if the server keeps uploads for further sessions, else 0.
    inline : int
        Bytes up to which the client may send an array inside a batch.
    repeats : int
        1 if it may name calls instead of sending them, see ``wire.repeats``.
    took : int
        Microseconds that the server took for this: the rest of what the client waited was the way.
    """

    version: int = MAX_VERSION
    software: str = ""
    server: str = ""
    host: str = ""
    session: bytes = b""
    secret: bytes = b""
    backend: str = ""
    devices: list[dict[str, Any]] = field(default_factory=list)
    memory_limit: int = 0
    grace: float = 60.0
    window: int = 0
    receipt: Receipt = field(default_factory=Receipt)
    choice: dict[str, Any] = field(default_factory=dict)
    advertise: str = ""
    worker: int = 0
    contents: int = 0
    inline: int = INLINE_PAYLOAD
    repeats: int = 0
    took: int = 0

    def encode(self) -> bytes:
        body = {
            "version": self.version,
            "software": self.software,
            "server": self.server,
            "host": self.host,
            "session": self.session,
            "secret": self.secret,
            "backend": self.backend,
            "devices": self.devices,
            "memory_limit": self.memory_limit,
            "grace": self.grace,
            "window": self.window,
            "receipt": self.receipt.to_wire(),
            "choice": self.choice,
            "advertise": self.advertise,
            "worker": self.worker,
            "contents": self.contents,
            "inline": self.inline,
            "repeats": self.repeats,
            "took": self.took,
        }
        return _frame(HelloKind.WELCOME, body, (MIN_VERSION, MAX_VERSION))

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Welcome:
        devices = _get(body, "devices", list, [])
        if not all(isinstance(device, dict) for device in devices):
            raise ProtocolError("the handshake's 'devices' is not a list of maps")
        return cls(
            version=_get(body, "version", int, 0),
            software=_get(body, "software", str, ""),
            server=_get(body, "server", str, ""),
            host=_get(body, "host", str, ""),
            session=_get(body, "session", bytes, b""),
            secret=_get(body, "secret", bytes, b""),
            backend=_get(body, "backend", str, ""),
            devices=devices,
            memory_limit=_get(body, "memory_limit", int, 0),
            grace=float(_get(body, "grace", (int, float), 60.0)),
            window=_get(body, "window", int, 0),
            receipt=Receipt.from_wire(body.get("receipt", [0, []])),
            choice=_get(body, "choice", dict, {}),
            advertise=_get(body, "advertise", str, ""),
            worker=_get(body, "worker", int, 0),
            contents=_get(body, "contents", int, 0),
            inline=_get(body, "inline", int, INLINE_PAYLOAD),
            repeats=_get(body, "repeats", int, 0),
            took=_get(body, "took", int, 0),
        )


@dataclass(slots=True)
class Refusal:
    """The server does not take the connection: a wire code and a text."""

    code: int
    message: str
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: GpuRemoteError) -> Refusal:
        reasons = getattr(error, "reasons", {})
        return cls(error.code, error.message, dict(reasons))

    def encode(self) -> bytes:
        body = {"code": self.code, "message": self.message, "reasons": self.reasons}
        return _frame(HelloKind.REFUSAL, body, (MIN_VERSION, MAX_VERSION))

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Refusal:
        return cls(
            _get(body, "code", int, 1), _get(body, "message", str, ""), _texts(body, "reasons")
        )

    def error(self, peer: str) -> GpuRemoteError:
        return error_from_wire(self.code, self.message, peer=peer)


@dataclass(slots=True)
class Challenge:
    """The server wants to be shown that the client knows the token (see ``wire.identity``)."""

    nonce: bytes

    def encode(self) -> bytes:
        return _frame(HelloKind.CHALLENGE, {"nonce": self.nonce}, (MIN_VERSION, MAX_VERSION))

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Challenge:
        return cls(_get(body, "nonce", bytes, b""))


@dataclass(slots=True)
class Proof:
    """The answer to a challenge, and what the server then shows."""

    proof: bytes

    def encode(self) -> bytes:
        return _frame(HelloKind.PROOF, {"proof": self.proof}, (MIN_VERSION, MAX_VERSION))

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Proof:
        return cls(_get(body, "proof", bytes, b""))


@dataclass(slots=True)
class Opened:
    """What a server with TLS answers to a HELLO for a new session, instead of a WELCOME: a process
    waits for the client, who is to connect once more, with a ROUTE and a HELLO that resumes.

    Encryption can't be handed from the process that listens to another one.
    """

    session: bytes
    secret: bytes

    def encode(self) -> bytes:
        body = {"session": self.session, "secret": self.secret}
        return _frame(HelloKind.OPENED, body, (MIN_VERSION, MAX_VERSION))

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Opened:
        return cls(_get(body, "session", bytes, b""), _get(body, "secret", bytes, b""))


@dataclass(slots=True)
class Starting:
    """Ahead of the answer to a HELLO for a new session: that a process has to be started for it
    first, and how many seconds that may take at most."""

    seconds: float

    def encode(self) -> bytes:
        return _frame(HelloKind.STARTING, {"seconds": self.seconds}, (MIN_VERSION, MAX_VERSION))

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Starting:
        return cls(float(_get(body, "seconds", (int, float), 0.0)))


@dataclass(slots=True)
class Route:
    """The first words of a connection to a session of a server with TLS, in the clear: so the
    process that listens knows whose it is. Behind it TLS begins. It proves nothing."""

    session: bytes

    def encode(self) -> bytes:
        return _frame(HelloKind.ROUTE, {"session": self.session}, (MIN_VERSION, MAX_VERSION))

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Route:
        return cls(_get(body, "session", bytes, b""))


@dataclass(slots=True)
class Attach:
    """The first words of a connection that is a lane beside another one of the session, which
    is being set up.

    Attributes
    ----------
    lane : int
        Its number.
    proof : bytes
        Over the nonce that the worker told for this set-up; see ``transport.lanes.offer``. So it is
        good for one lane of one set-up.
    """

    session: bytes
    lane: int
    proof: bytes

    def encode(self) -> bytes:
        body = {"session": self.session, "lane": self.lane, "proof": self.proof}
        return _frame(HelloKind.ATTACH, body, (MIN_VERSION, MAX_VERSION))

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Attach:
        return cls(
            _get(body, "session", bytes, b""),
            _get(body, "lane", int, -1),
            _get(body, "proof", bytes, b""),
        )


Message = Hello | Welcome | Refusal | Challenge | Proof | Opened | Route | Attach | Starting


class HelloReader:
    """Takes the bytes of one handshake message as they come.

    Parameters
    ----------
    peer : str
        Address of the other end, for error texts.
    """

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._buffer = bytearray()

    @property
    def missing(self) -> int:
        """Bytes to read next; never asks for more than the handshake message has."""
        if len(self._buffer) < PREFIX_SIZE:
            return PREFIX_SIZE - len(self._buffer)
        length: int = _PREFIX.unpack_from(self._buffer)[4]
        return PREFIX_SIZE + length - len(self._buffer)

    @property
    def raw(self) -> bytes:
        """What has come."""
        return bytes(self._buffer)

    def feed(self, data: BytesIn) -> Message | None:
        """Add bytes; returns the message once it is complete.

        Raises
        ------
        NotAGpuRemoteServer
            The first bytes are not this protocol's, or the stream ended before them.
        LimitExceeded
            The announced body is over ``MAX_HELLO``.
        UnsupportedVersion
            No common version (only when the other side speaks first, as a client does).
        ConnectionLost
            The stream ended in the middle.
        ProtocolError
            Malformed.
        """
        return self.message() if self.fill(data) else None

    def fill(self, data: BytesIn) -> bool:
        """Add bytes, and look at nothing but the prefix; whether the message is complete. Raises
        as ``feed`` does."""
        buffer = self._buffer
        if not data:
            if not buffer:
                raise NotAGpuRemoteServer(
                    "the connection was closed without an answer; is this a gpuremote server?",
                    peer=self._peer,
                )
            raise ConnectionLost(
                "the connection ended in the middle of the handshake", peer=self._peer
            )
        buffer += data
        if bytes(buffer[:4]) != _MAGIC[: len(buffer)]:
            raise NotAGpuRemoteServer(
                f"what answers there is not a gpuremote server (its first bytes are "
                f"{bytes(buffer[:16])!r}); check host and port",
                peer=self._peer,
            )
        if len(buffer) < PREFIX_SIZE:
            return False
        length: int = _PREFIX.unpack_from(buffer)[4]
        if length > MAX_HELLO:
            raise LimitExceeded(
                f"a handshake of {length} bytes, at most {MAX_HELLO} are allowed", peer=self._peer
            )
        return len(buffer) == PREFIX_SIZE + length

    def message(self) -> Message:
        """The complete message. Raises as ``feed`` does."""
        buffer = self._buffer
        _, low, high, kind, _ = _PREFIX.unpack_from(buffer)
        body = unpack_info(memoryview(buffer)[PREFIX_SIZE:], MAX_HELLO)
        if not isinstance(body, dict):
            raise ProtocolError("the handshake's body is not a map", peer=self._peer)
        match kind:
            case HelloKind.HELLO:
                return Hello.decode(body, (low, high))
            case HelloKind.WELCOME:
                choose_version(low, high)
                return Welcome.decode(body)
            case HelloKind.REFUSAL:
                return Refusal.decode(body)
            case HelloKind.CHALLENGE:
                return Challenge.decode(body)
            case HelloKind.PROOF:
                return Proof.decode(body)
            case HelloKind.OPENED:
                return Opened.decode(body)
            case HelloKind.ROUTE:
                return Route.decode(body)
            case HelloKind.ATTACH:
                return Attach.decode(body)
            case HelloKind.STARTING:
                return Starting.decode(body)
        raise ProtocolError(f"handshake message of unknown kind {kind}", peer=self._peer)


BytesIn = bytes | bytearray | memoryview


def _frame(kind: HelloKind, body: Mapping[str, Any], versions: tuple[int, int]) -> bytes:
    packed = pack_info(body)
    if len(packed) > MAX_HELLO:
        raise LimitExceeded(f"a handshake of {len(packed)} bytes, at most {MAX_HELLO} are allowed")
    return _PREFIX.pack(_MAGIC, versions[0], versions[1], kind, len(packed)) + packed


def _get(body: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any) -> Any:
    value = body.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProtocolError(f"the handshake's {key!r} has the wrong type")
    return value


def _texts(body: Mapping[str, Any], key: str) -> dict[str, str]:
    value = body.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ProtocolError(f"the handshake's {key!r} is not a map of texts")
    return {str(k): v for k, v in value.items()}
