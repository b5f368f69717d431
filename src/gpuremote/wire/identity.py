"""Proofs that an end of a connection knows the shared token, without telling it.

The server sends a nonce; the client answers with an HMAC-SHA256 over it and over its HELLO, which
carries a nonce of its own, and then the server proves the same. So neither proof can be used a
second time, neither can be turned into the other, and nothing in the HELLO can be changed on the
way (the construction is that of challenge and response in RFC 5802, for a secret of full entropy).
Over TLS the server's certificate goes in as well, as each side sees it: somebody in between, who
has a certificate of his own that the client trusts, can't pass the proof on. It proves who is
there. It encrypts nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

__all__ = ["NONCE_SIZE", "client_proof", "matches", "server_proof"]

NONCE_SIZE: Final = 32


def client_proof(token: bytes, nonce: bytes, hello: bytes, certificate: bytes = b"") -> bytes:
    """What a client answers to the challenge ``nonce``, having said ``hello`` to the server that
    showed ``certificate`` (in DER; empty without TLS)."""
    return _proof(b"gpuremote client", token, nonce, hello, certificate)


def server_proof(token: bytes, nonce: bytes, hello: bytes, certificate: bytes = b"") -> bytes:
    """What the server then answers."""
    return _proof(b"gpuremote server", token, nonce, hello, certificate)


def matches(one: bytes, other: bytes) -> bool:
    """Compare, in a time that tells nothing."""
    return hmac.compare_digest(one, other)


def _proof(side: bytes, token: bytes, nonce: bytes, hello: bytes, certificate: bytes) -> bytes:
    # All of fixed length but the nonce, so that no two cases give the same text.
    text = side + b"\0" + b"".join(hashlib.sha256(x).digest() for x in (hello, certificate)) + nonce
    return hmac.new(token, text, hashlib.sha256).digest()
