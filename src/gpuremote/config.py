"""What a program, a URL and the environment may set, read once and checked.

Values only: nothing here opens anything, and nothing here changes the environment.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final, Literal, TypeAlias, get_args
from urllib.parse import unquote

from gpuremote.errors import ConfigError, InvalidURL

__all__ = [
    "DEFAULT_PORT",
    "MIN_TOKEN",
    "Debug",
    "Download",
    "Scheme",
    "Settings",
    "Target",
    "check_token",
    "format_address",
    "parse_address",
    "parse_size",
    "parse_url",
]

Scheme: TypeAlias = Literal["gpu", "local", "pool"]
"""``gpu`` one device server, ``local`` one started as a child, ``pool`` a leased device."""

Download: TypeAlias = Literal["error", "warn", "allow"]
"""What happens when something would turn a remote array into a local one without being asked."""

Debug: TypeAlias = Literal["", "sync"]
"""``sync`` waits after every op, so that an error is raised where the op was issued."""

DEFAULT_PORT: Final = 7700
"""TCP port of a device server when an address names none."""

DEFAULT_CONNECT_TIMEOUT: Final = 10.0
"""Seconds for name resolution, connect and handshake together."""

MIN_TOKEN: Final = 16
"""Characters of a token. Whoever has seen a handshake can try out short ones at leisure."""
DEFAULT_GRACE: Final = 30.0
"""Seconds that a session waits for its client to come back after a lost connection."""

MAX_DEVICES: Final = 1024
MAX_LANES: Final = 16
MAX_SECONDS: Final = 86400.0
MAX_SIZE: Final = (1 << 63) - 1

_SCHEMES: Final[tuple[Scheme, ...]] = get_args(Scheme)
_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_COMPRESSION: Final = ("auto", "off", "lz4", "zstd")
_DEDUPE: Final = ("auto", "on", "off")
_SIZE: Final = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]{0,8})", re.ASCII)
_HOST: Final = re.compile(r"[\w.-]{1,253}")
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)
_SECONDS: Final = re.compile(r"\d{1,9}(?:\.\d{1,9})?", re.ASCII)
_COUNT: Final = re.compile(r"\d{1,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect and how: a device URL, taken apart.

    Attributes
    ----------
    scheme : {"gpu", "local", "pool"}
        Kind of URL.
    host : str
        Name or IP address, without brackets; empty for ``local``.
    port : int
        TCP port.
    transport : str or None
        Consider this transport only.
    require : str or None
        Fail where this transport can't be had, instead of falling back.
    connect_timeout : float
        Seconds for name resolution, connect and handshake together.
    grace : float
        Seconds that the session outlives a lost connection.
    backend : str or None
        ``local`` only: the backend of the server that is started.
    devices : int or None
        ``local`` only: how many devices that server offers.
    lanes : int
        Connections for large payloads over tcp, 1 to 16; 0: as many as the way needs.
    compression : {"auto", "off", "lz4", "zstd"}
        Of large payloads over tcp; ``auto``: on a slow way, where it pays.
    dedupe : {"auto", "on", "off"}
        Whether a large upload does not travel where the server has its bytes already; ``auto``:
        where the way is slow compared with finding out.
    memory : int or None
        Bytes of device memory: the session's limit, or with ``pool`` what each device must have.
    count : int
        ``pool`` only: how many devices to lease.
    tls : bool or None
        Encrypt, or do not; None: if ``cafile`` or ``certfile`` is given, or ``GPUREMOTE_CAFILE``.
    cafile : str or None
        PEM file with the certificates that are trusted.
    certfile, keyfile : str or None
        PEM files of this side's own certificate, for a server that wants one.
    labels : tuple of (str, str)
        ``pool`` only: everything else that the device must match, in the order of the URL.
    """

    scheme: Scheme
    host: str = ""
    port: int = DEFAULT_PORT
    transport: str | None = None
    require: str | None = None
    connect_timeout: float = DEFAULT_CONNECT_TIMEOUT
    grace: float = DEFAULT_GRACE
    backend: str | None = None
    devices: int | None = None
    lanes: int = 0
    compression: str = "auto"
    dedupe: str = "auto"
    memory: int | None = None
    count: int = 1
    tls: bool | None = None
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def address(self) -> str:
        """``host:port`` for messages, IPv6 in brackets; empty for ``local``."""
        return format_address(self.host, self.port) if self.host else ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says.

    Attributes
    ----------
    url : str
        Device URL for a program that names none (``GPUREMOTE_URL``).
    download : {"error", "warn", "allow"}
        What an implicit download does (``GPUREMOTE_DOWNLOAD``).
    debug : {"", "sync"}
        ``GPUREMOTE_DEBUG``.
    transport : str
        The only one to use where the URL names none (``GPUREMOTE_TRANSPORT``).
    token : bytes
        The secret that a server with ``--token-file`` wants to see proved (``GPUREMOTE_TOKEN``).
    cafile : str
        PEM file with the certificates that are trusted, for a URL that names none
        (``GPUREMOTE_CAFILE``); connections are encrypted then.
    stack : int
        Frames of the caller's stack that are kept with each op, for its error
        (``GPUREMOTE_STACK``); 0 keeps none.
    """

    url: str = "local://"
    download: Download = "error"
    debug: Debug = ""
    stack: int = 2
    token: bytes = field(default=b"", repr=False)
    transport: str = ""
    cafile: str = ""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from ``environ``; a variable that is missing or empty sets nothing.

        Raises
        ------
        ConfigError
            A value that is out of its range; the text names the variable.
        InvalidURL
            ``GPUREMOTE_URL`` is no device URL.
        """
        found: dict[str, Any] = {}
        if url := environ.get("GPUREMOTE_URL", "").strip():
            try:
                parse_url(url)
            except InvalidURL as error:
                raise InvalidURL(f"GPUREMOTE_URL: {error.message}") from None
            found["url"] = url
        if download := environ.get("GPUREMOTE_DOWNLOAD", ""):
            found["download"] = _one_of("GPUREMOTE_DOWNLOAD", download, get_args(Download))
        if debug := environ.get("GPUREMOTE_DEBUG", ""):
            found["debug"] = _one_of("GPUREMOTE_DEBUG", debug, get_args(Debug))
        if stack := environ.get("GPUREMOTE_STACK", ""):
            if not _COUNT.fullmatch(stack) or int(stack) > 64:
                raise ConfigError(
                    f"GPUREMOTE_STACK={stack!r}: expected a number of stack frames from 0 to 64"
                )
            found["stack"] = int(stack)
        if transport := environ.get("GPUREMOTE_TRANSPORT", "").strip():
            found["transport"] = transport
        if token := environ.get("GPUREMOTE_TOKEN", "").strip():
            found["token"] = check_token(token, "GPUREMOTE_TOKEN")
        if cafile := environ.get("GPUREMOTE_CAFILE", ""):
            found["cafile"] = cafile
        return cls(**found)


def check_token(token: str, source: str) -> bytes:
    """The token as bytes.

    Raises
    ------
    ConfigError
        Too short to be a secret; ``source`` says where it came from.
    """
    if len(token) < MIN_TOKEN:
        raise ConfigError(
            f"{source}: a token of {len(token)} characters can be guessed; at least {MIN_TOKEN}, "
            'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return token.encode()


def parse_url(url: str) -> Target:
    """Take a device URL apart.

    ``gpu://HOST[:PORT]``, ``pool://HOST[:PORT]`` or ``local://``, each with options after a
    ``?``. An IPv6 address stands in brackets.

    Raises
    ------
    InvalidURL
        The text says which part is wrong and what would be right.
    """
    head, query_mark, query = url.partition("?")
    scheme, separator, rest = head.partition("://")
    if not separator:
        raise InvalidURL(
            f"{url!r} is no device URL: no '://'; write gpu://HOST:PORT, pool://HOST:PORT "
            "or local://"
        )
    if scheme not in _SCHEMES:
        raise InvalidURL(f"{url!r}: unknown scheme {scheme!r}{_known(scheme, _SCHEMES)}")
    if "#" in url:
        raise InvalidURL(f"{url!r}: '#' has no meaning in a device URL; write %23 in a value")
    authority, _, path = rest.partition("/")
    if path:
        raise InvalidURL(f"{url!r}: a device URL has no path, got {'/' + path!r}")
    if "@" in authority:
        raise InvalidURL(f"a {scheme}:// URL carries no user name or password; remove 'USER@'")

    values: dict[str, Any] = {}
    if scheme == "local":
        if authority:
            raise InvalidURL(
                f"{url!r}: local:// starts a server on this machine and takes no host; "
                f"to reach a running server write gpu://{authority}"
            )
    else:
        try:
            values["host"], values["port"] = _split_address(authority, lowest_port=1)
        except ConfigError as error:
            raise InvalidURL(f"{url!r}: {error.message}") from None
    if query_mark:
        values |= _options(url, scheme, query)
    return Target(scheme, **values)


def parse_address(text: str, default_port: int = DEFAULT_PORT) -> tuple[str, int]:
    """Split ``HOST:PORT``; port 0 (any free one) is allowed, and an IPv6 host has brackets.

    Raises
    ------
    ConfigError
        No host, or no such port.
    """
    return _split_address(text, default_port)


def format_address(host: str, port: int) -> str:
    """``host:port`` as a person writes it: an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_size(text: str) -> int:
    """Bytes of a size such as ``"8GiB"``, ``"1.5 GB"`` or ``"4096"``.

    Units of 1024: KiB, MiB, GiB, TiB; of 1000: KB, MB, GB, TB; none or B: bytes. Upper and
    lower case mean the same. A fraction of a byte is dropped.

    Raises
    ------
    ConfigError
        Not a size, an unknown unit, or more than 2**63 - 1 bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no size; write a number and a unit, such as 8GiB or 512MB")
    number, unit = match.groups()
    factor = _UNITS.get(unit.lower())
    if factor is None:
        hint = "use KiB, MiB, GiB, TiB, KB, MB, GB, TB or B"
        if (letter := unit[0].upper()) in "KMGT":
            # "8G" is refused rather than guessed: 8 GB and 8 GiB are 7 % apart.
            hint = f"write {number}{letter}iB (units of 1024) or {number}{letter}B (of 1000)"
        raise ConfigError(f"{text!r}: unknown unit {unit!r}; {hint}")
    size = int(Fraction(number) * factor)
    if size > MAX_SIZE:
        raise ConfigError(f"{text!r} is more than {MAX_SIZE} bytes")
    return size


def _split_address(
    text: str, default_port: int = DEFAULT_PORT, *, lowest_port: int = 0
) -> tuple[str, int]:
    if text.startswith("["):
        host, bracket, tail = text[1:].partition("]")
        if not bracket:
            raise ConfigError(f"{text!r}: no ']' after the IPv6 address")
        host = unquote(host)  # a zone is written %25eth0 in a URL
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ConfigError(f"{text!r}: {host!r} is no IPv6 address") from None
        if tail and not tail.startswith(":"):
            raise ConfigError(f"{text!r}: expected ':PORT' after ']', got {tail!r}")
        colon, port = tail[:1], tail[1:]
    else:
        host, colon, port = text.partition(":")
        if ":" in port:
            raise ConfigError(f"{text!r}: an IPv6 address stands in brackets: [{text}]")
        if not host:
            raise ConfigError(
                f"{text!r}: no host; name one (0.0.0.0 or [::] for every interface of a server)"
            )
        if not _HOST.fullmatch(host):
            raise ConfigError(f"{text!r}: {host!r} is no host name")
    if not colon:
        return host, default_port
    if not _COUNT.fullmatch(port) or not lowest_port <= int(port) <= 65535:
        raise ConfigError(f"{text!r}: port {port!r} is not a number from {lowest_port} to 65535")
    return host, int(port)


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ConfigError("expected a name such as tcp")
    return text


def _seconds(text: str) -> float:
    if not _SECONDS.fullmatch(text):
        raise ConfigError("expected seconds, such as 10 or 2.5")
    value = float(text)
    if not math.isfinite(value) or not 0 <= value <= MAX_SECONDS:
        raise ConfigError(f"expected 0 to {MAX_SECONDS:g} seconds")
    return value


def _positive_seconds(text: str) -> float:
    if not (value := _seconds(text)):
        raise ConfigError("expected more than 0 seconds")
    return value


def _device_count(text: str) -> int:
    if not _COUNT.fullmatch(text) or not 1 <= int(text) <= MAX_DEVICES:
        raise ConfigError(f"expected a whole number from 1 to {MAX_DEVICES}")
    return int(text)


def _lanes(text: str) -> int:
    if text == "auto":
        return 0
    if not _COUNT.fullmatch(text) or not 1 <= int(text) <= MAX_LANES:
        raise ConfigError(f"expected auto or a whole number from 1 to {MAX_LANES}")
    return int(text)


def _compression(text: str) -> str:
    if text not in _COMPRESSION:
        raise ConfigError(f"expected one of {', '.join(_COMPRESSION)}")
    return text


def _dedupe(text: str) -> str:
    if text not in _DEDUPE:
        raise ConfigError(f"expected one of {', '.join(_DEDUPE)}")
    return text


def _positive_size(text: str) -> int:
    if not (size := parse_size(text)):
        raise ConfigError("expected more than 0 bytes")
    return size


def _path(text: str) -> str:
    if "\0" in text:
        raise ConfigError("expected the path of a file")
    return text


def _switch(text: str) -> bool:
    if text not in ("1", "on", "0", "off"):
        raise ConfigError("expected on or off")
    return text in ("1", "on")


_Reader: TypeAlias = Callable[[str], object]
_COMMON: Final[dict[str, _Reader]] = {
    "transport": _name,
    "require": _name,
    "connect_timeout": _positive_seconds,
    "grace": _seconds,
    "memory": _positive_size,
    "lanes": _lanes,
    "compression": _compression,
    "dedupe": _dedupe,
}
_REMOTE: Final[dict[str, _Reader]] = {
    **_COMMON,
    "tls": _switch,
    "cafile": _path,
    "certfile": _path,
    "keyfile": _path,
}
_OPTIONS: Final[dict[Scheme, dict[str, _Reader]]] = {
    "gpu": _REMOTE,
    "local": {**_COMMON, "backend": _name, "devices": _device_count},
    "pool": {**_REMOTE, "count": _device_count},
}


def _options(url: str, scheme: Scheme, query: str) -> dict[str, object]:
    readers = _OPTIONS[scheme]
    values: dict[str, object] = {}
    labels: dict[str, str] = {}
    for item in query.split("&"):
        raw_key, equals, raw_value = item.partition("=")
        key, value = unquote(raw_key), unquote(raw_value)
        if not key or not equals or not value:
            raise InvalidURL(f"{url!r}: {item!r} is no option; write NAME=VALUE")
        if key in values or key in labels:
            raise InvalidURL(f"{url!r}: option {key!r} is given twice")
        if (reader := readers.get(key)) is not None:
            try:
                values[key] = reader(value)
            except ConfigError as error:
                raise InvalidURL(f"{url!r}: option {key}={value!r}: {error.message}") from None
        elif scheme == "pool":
            labels[key] = value
        else:
            raise InvalidURL(f"{url!r}: unknown option {key!r}{_known(key, readers)}")
    transport, require = values.get("transport"), values.get("require")
    if transport and require and transport != require:
        raise InvalidURL(
            f"{url!r}: transport={transport} and require={require} contradict each other; "
            "keep one of them"
        )
    if values.get("tls") is False and (values.get("cafile") or values.get("certfile")):
        raise InvalidURL(
            f"{url!r}: tls=off and a certificate contradict each other; keep one of them"
        )
    if values.get("keyfile") and not values.get("certfile"):
        raise InvalidURL(f"{url!r}: keyfile needs certfile, the certificate that it belongs to")
    if labels:
        values["labels"] = tuple(labels.items())
    return values


def _one_of(variable: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        named = tuple(filter(None, choices))
        raise ConfigError(f"{variable}={value!r}{_known(value, named)}")
    return value


def _known(name: str, names: Iterable[str]) -> str:
    """The closest name and all of them, as the end of an error's text."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f", did you mean {close[0]!r}?" if close else ";"
    return f"{guess} known: {', '.join(known)}"
