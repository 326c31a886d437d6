"""An identity provider on this machine: its keys over HTTP, and tokens that they sign."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

AUDIENCE = "loradock"


class IdentityProvider:
    """`asked` counts how often its keys were read; `down` has it answer 500."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.asked, self.down = 0, False
        self.issuer = ""

    def add(self, kid: str, kind: str = "RSA", **more: Any) -> None:
        """A new key of this id."""
        private: Any = (
            rsa.generate_private_key(public_exponent=65537, key_size=more.pop("bits", 2048))
            if kind == "RSA"
            else ec.generate_private_key(ec.SECP256R1())
        )
        algorithm: Any = jwt.algorithms.RSAAlgorithm if kind == "RSA" else jwt.algorithms.ECAlgorithm
        public = json.loads(algorithm.to_jwk(private.public_key()))
        self.keys[kid] = (private, {**public, "kid": kid, "use": "sig", **more})

    def jwks(self) -> dict[str, Any]:
        return {"keys": [public for _, public in self.keys.values()]}

    def pem(self, kid: str) -> bytes:
        """The public key, as everybody may have it."""
        key: bytes = self.keys[kid][0].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return key

    def token(self, kid: str = "rsa", algorithm: str = "RS256", key: Any = None, **claims: Any) -> str:
        """A token that is in order, but for these claims; None leaves one out."""
        now = time.time()
        stated = {
            "iss": self.issuer, "aud": AUDIENCE, "sub": "anna", "exp": now + 600, "nbf": now - 1,
            "tenant": "acme", "scope": "inference", **claims,
        }  # fmt: skip
        private = self.keys[kid][0] if key is None else key
        stated = {name: value for name, value in stated.items() if value is not None}
        return jwt.encode(stated, private, algorithm=algorithm, headers={"kid": kid})


@contextmanager
def running() -> Iterator[IdentityProvider]:
    """One with an RSA and an EC key, that listens."""
    provider = IdentityProvider()
    provider.add("rsa")
    provider.add("ec", "EC")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            provider.asked += 1
            found = {"/.well-known/openid-configuration": {"jwks_uri": f"{provider.issuer}/keys"}}
            answer = provider.jwks() if self.path == "/keys" else found.get(self.path)
            body = json.dumps(answer).encode()
            self.send_response(500 if provider.down or answer is None else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    provider.issuer = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
