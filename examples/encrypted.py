"""TLS and a token: a certificate made on the spot, and a session that it protects.

Prints, among other things::

    sum: 499500.0
    encrypted: TLSv1.3
"""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
from pathlib import Path

import gpuremote
from gpuremote.testing.servers import device_server

CERTIFICATE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 "
    "-keyout key.pem -out cert.pem -subj /CN=gpuremote -addext subjectAltName=IP:127.0.0.1"
)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(CERTIFICATE.split(), cwd=folder, check=True, capture_output=True)
        certificate, key, token = (str(folder / file) for file in ("cert.pem", "key.pem", "token"))
        os.environ["GPUREMOTE_TOKEN"] = secrets.token_urlsafe(32)
        Path(token).write_text(os.environ["GPUREMOTE_TOKEN"])
        options = ["--certfile", certificate, "--keyfile", key, "--token-file", token]
        with device_server(*options) as server:
            # Within a host shared memory would take over; this is to show the way between hosts.
            url = f"{server.url}?cafile={certificate}&transport=tcp"
            with gpuremote.connect_sync(url) as session:
                x = session.devices[0].arange(1000.0)
                print("sum:", float(x.sum()))
                facts = session.transport.explain().as_dict()["connection"]["tls"]
                print("encrypted:", facts["version"])
                print("with:", facts["cipher"])


if __name__ == "__main__":
    main()
