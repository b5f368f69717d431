"""Proofs that an end of a connection knows the shared token, without telling it.

The server sends a nonce; the client answers with an HMAC-SHA256 over it and over its HELLO, which
carries a nonce of its own, and then the server proves the same. So neither proof can be used a
second time, neither can be turned into the other, and nothing in the HELLO can be changed on the
way (the construction is that of challenge and response in RFC 5802, for a secret of full entropy).
It proves who is there. It encrypts nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

__all__ = ["NONCE_SIZE", "client_proof", "matches", "server_proof"]

NONCE_SIZE: Final = 32


def client_proof(token: bytes, nonce: bytes, hello: bytes) -> bytes:
    """What a client answers to the challenge ``nonce``, having said ``hello``."""
    return _proof(b"gpuremote client", token, nonce, hello)


def server_proof(token: bytes, nonce: bytes, hello: bytes) -> bytes:
    """What the server then answers."""
    return _proof(b"gpuremote server", token, nonce, hello)


def matches(one: bytes, other: bytes) -> bool:
    """Compare, in a time that tells nothing."""
    return hmac.compare_digest(one, other)


def _proof(side: bytes, token: bytes, nonce: bytes, hello: bytes) -> bytes:
    text = side + b"\0" + nonce + hashlib.sha256(hello).digest()
    return hmac.new(token, text, hashlib.sha256).digest()
