"""Certificates for tests, made by the ``openssl`` command when they are needed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

from gpuremote.transport.certificates import TlsClient, TlsServer

__all__ = ["Authority", "Issued"]

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def _openssl(*arguments: str) -> None:
    done = subprocess.run(
        ["openssl", *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr


class Issued(NamedTuple):
    """A certificate and its key, as files."""

    certfile: str
    keyfile: str


class Authority:
    """Somebody who signs certificates.

    Attributes
    ----------
    cafile : str
        Its own certificate.
    """

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = name
        self.cafile = str(folder / f"{name}.pem")
        self._key = str(folder / f"{name}.key")
        _openssl(
            *("req", "-x509", *_KEY, "-keyout", self._key, "-out", self.cafile),
            *("-days", "2", "-subj", f"/CN={name}"),
        )

    def issue(
        self, name: str, names: str = "DNS:localhost,IP:127.0.0.1,IP:::1", days: int = 2
    ) -> Issued:
        """A certificate for ``names``; one of fewer than 0 days has expired."""
        base = self._folder / f"{self._name}-{name}"
        request, certificate, key = (str(base) + end for end in (".csr", ".pem", ".key"))
        _openssl(
            *("req", "-new", *_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName={names}"),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.cafile, "-CAkey", self._key),
            *("-days", str(days), "-copy_extensions", "copy", "-out", certificate),
        )
        return Issued(certificate, key)

    def server(self) -> TlsServer:
        return TlsServer(*self.issue("server"))

    def client(self) -> TlsClient:
        return TlsClient(self.cafile)
