"""Who is trusted, and who this side is: the settings of TLS, and what its errors mean.

TLS 1.3 only. No session tickets: a connection is opened once or after a loss, and what comes
behind a handshake would get in the way of a socket that is closed at once.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from pathlib import Path
from typing import Final, NoReturn

from gpuremote.errors import (
    AuthenticationFailed,
    ConfigError,
    GpuRemoteError,
    NotAGpuRemoteServer,
)

__all__ = ["TlsClient", "TlsServer", "handshake_failure"]

_EXPIRED: Final = 10
_NOT_YET: Final = 9
_NAMES: Final = (62, 64)
"""X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""
_UNKNOWN: Final = (18, 19, 20, 21)
"""Self-signed, or signed by somebody whom the CA file does not have."""


class TlsClient:
    """How a client finds out that a server is the one it means, and shows who it is itself.

    Nothing is read before :meth:`context`.

    Parameters
    ----------
    cafile : str
        PEM file with the certificates that are trusted; empty: the system's.
    certfile, keyfile : str
        PEM files of this side's own certificate, for a server that wants one. Without ``keyfile``
        the key is in ``certfile``.
    """

    def __init__(self, cafile: str = "", certfile: str = "", keyfile: str = "") -> None:
        self.cafile = cafile
        self.certfile = certfile
        self.keyfile = keyfile
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None

    @property
    def trusted(self) -> str:
        """Whose certificates are trusted, for people."""
        return self.cafile or "the system's certificates"

    def context(self) -> ssl.SSLContext:
        """What the files say; read once.

        Raises
        ------
        ConfigError
            A file that can't be used; the text says which one and why.
        """
        with self._lock:
            if self._context is None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.hostname_checks_common_name = False
                _restrict(context)
                if self.cafile:
                    _trust(context, self.cafile)
                else:
                    context.load_default_certs()
                if self.certfile:
                    _own(context, self.certfile, self.keyfile)
                self._context = context
            return self._context


class TlsServer:
    """A server's certificate, and whose clients it takes.

    Parameters
    ----------
    certfile, keyfile : str
        PEM files; without ``keyfile`` the key is in ``certfile``.
    client_ca : str
        PEM file: clients have to show a certificate that one of these has signed. Empty: they
        need none.

    Attributes
    ----------
    context : ssl.SSLContext
    certificate : bytes
        This server's own, in DER.

    Raises
    ------
    ConfigError
        A file that can't be used; the text says which one and why.
    """

    def __init__(self, certfile: str, keyfile: str = "", client_ca: str = "") -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _restrict(context)
        context.num_tickets = 0
        _own(context, certfile, keyfile)
        if client_ca:
            _trust(context, client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        self.context = context
        self.client_ca = client_ca
        text = Path(certfile).read_text("utf-8", "replace")
        end = "-----END CERTIFICATE-----"
        begin = text.index("-----BEGIN CERTIFICATE-----")
        first = text[begin : text.index(end, begin) + len(end)]
        self.certificate = ssl.PEM_cert_to_DER_cert(first)


def _restrict(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A certificate that is listed itself is trusted, whoever has signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


def _trust(context: ssl.SSLContext, path: str) -> None:
    _readable(path)
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no certificates in PEM format are in there") from error


def _own(context: ssl.SSLContext, certfile: str, keyfile: str) -> None:
    _readable(certfile)
    if keyfile:
        _readable(keyfile)
    key = keyfile or certfile

    def encrypted() -> NoReturn:
        # The default would be to ask at the terminal, which nobody may be sitting at.
        raise ConfigError(f"{key}: the key is encrypted; give one without a passphrase")

    try:
        context.load_cert_chain(certfile, keyfile or None, encrypted)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key}: this is not the key of {certfile}") from error
        raise ConfigError(
            f"{certfile} and {key}: no certificate and key in PEM format are in there"
        ) from error


def _readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error


def handshake_failure(error: OSError, host: str, client: TlsClient, first: bytes) -> GpuRemoteError:
    """What a client raises for an error of TLS: what happened, and what to do about it.

    Parameters
    ----------
    error : OSError
        Mostly an ``ssl.SSLError``.
    host : str
        As in the URL.
    first : bytes
        What the other end said first.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthenticationFailed(_not_verified(error, host, client))
    if first.startswith(b"gpuR"):
        return AuthenticationFailed(
            "the server there speaks no TLS, and this side was told to: start it with --certfile "
            "and --keyfile, or leave TLS out (no cafile= in the URL; tls=off where "
            "GPUREMOTE_CAFILE is set)"
        )
    reason = (getattr(error, "reason", "") or "").upper()
    if "CERTIFICATE_REQUIRED" in reason:
        return AuthenticationFailed(
            "the server wants a certificate of this client: add certfile= and keyfile= to the URL"
        )
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return AuthenticationFailed(
            f"the server does not take the certificate of this client "
            f"({client.certfile or 'none'}): {reason.partition('ALERT_')[2].lower()}; it has to be "
            "valid, and signed by what the server's --client-ca names"
        )
    if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return NotAGpuRemoteServer("the server there does not speak TLS 1.3; check host and port")
    if first and first[0] != 0x16 and first[0] != 0x15:
        return NotAGpuRemoteServer(
            f"what answers there speaks no TLS (its first bytes are {first[:16]!r}); check host "
            "and port"
        )
    return NotAGpuRemoteServer(
        f"the TLS handshake failed ({reason or error}); is this a gpuremote server with --certfile?"
    )


def _not_verified(error: ssl.SSLCertVerificationError, host: str, client: TlsClient) -> str:
    code = error.verify_code
    if code in _NAMES:
        return (
            f"the server's certificate is not for {host!r}: use a name or address that is in it, "
            "or make one with that subjectAltName"
        )
    if code == _EXPIRED:
        return "the server's certificate has expired: it needs a new one (or this clock is wrong)"
    if code == _NOT_YET:
        return "the server's certificate is not valid yet: is this machine's clock right?"
    if code in _UNKNOWN:
        return (
            f"the server's certificate is not trusted ({error.verify_message}): nobody in "
            f"{client.trusted} has signed it; name its CA (or itself, if it is self-signed) with "
            "cafile= in the URL or GPUREMOTE_CAFILE"
        )
    return f"the server's certificate is not valid: {error.verify_message}"


def names(certificate: object) -> str:
    """Whom a certificate, as ``getpeercert`` gives it, is for."""
    found = certificate if isinstance(certificate, dict) else {}
    with contextlib.suppress(KeyError, ValueError, TypeError):
        subject = [value for part in found["subject"] for key, value in part if key == "commonName"]
        if subject:
            return str(subject[0])
    return "a name that is not given"
