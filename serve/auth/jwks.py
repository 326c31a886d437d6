"""The keys of an identity provider, from its JWKS address: read when they are needed, and again when one is unknown.

A provider rotates its keys: a token that names an unknown one has them read again, but not more often than every half
minute, whatever is sent. While the address does not answer, the keys that were read last hold for a day.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from serve.errors import EngineUnavailable
from serve.names import shown

DISCOVERY = "/.well-known/openid-configuration"
FRESH_SECONDS = 3600.0
AGAIN_SECONDS = 30.0
STALE_SECONDS = 86_400.0
MOST_BYTES = 1 << 20
MOST_KEYS = 100
SECONDS = 5.0
SHORTEST_RSA = 2048
_PRIVATE = ("d", "p", "q", "dp", "dq", "qi")
_CURVES = {"ES256": "secp256r1", "ES384": "secp384r1", "ES512": "secp521r1"}


class KeySet:
    """`address` is that of the keys; without it the issuer says where they are. Thread-safe; `get` blocks."""

    def __init__(self, issuer: str, address: str = "", *, clock: Callable[[], float] = time.monotonic) -> None:
        self._issuer = issuer
        self._address = address
        self._clock = clock
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read_at = self._tried_at = float("-inf")
        self._reading = threading.Lock()
        self._problem = ""

    def get(self, kid: str) -> jwt.PyJWK | None:
        """The key of this id; None if the provider has none. EngineUnavailable, if its keys cannot be read."""
        if kid not in self._keys or self._clock() - self._read_at > FRESH_SECONDS:
            with self._reading:  # whoever waited finds what the first one read
                if self._clock() - self._tried_at > AGAIN_SECONDS:
                    self._refresh()
        if self._clock() - self._read_at > STALE_SECONDS:
            raise EngineUnavailable(
                f"the identity provider's keys cannot be read now ({self._problem or 'not tried yet'}): retry shortly"
            )
        return self._keys.get(kid)

    def _refresh(self) -> None:
        self._tried_at = self._clock()
        try:
            self._keys = self.fetch()
            self._read_at, self._problem = self._clock(), ""
        except ValueError as error:
            self._problem = str(error)

    def fetch(self) -> dict[str, jwt.PyJWK]:
        """The keys as they are now, by their ids; ValueError says what is wrong."""
        with httpx.Client(follow_redirects=False, timeout=SECONDS) as client:
            address = self._address or self._discovered(client)
            document = _json(client, address)
        entries = document.get("keys")
        if not isinstance(entries, list):
            raise ValueError("the address holds no JWKS")
        keys = {}
        for entry in entries[:MOST_KEYS]:
            if (key := _key(entry)) is not None and isinstance(entry.get("kid"), str):
                keys[entry["kid"]] = key
        if not keys:
            raise ValueError("the JWKS holds no key that signs")
        return keys

    def _discovered(self, client: httpx.Client) -> str:
        address = _json(client, self._issuer.rstrip("/") + DISCOVERY).get("jwks_uri")
        if not isinstance(address, str) or not address.startswith(("https://", "http://")):
            raise ValueError("the issuer does not say where its keys are")
        return address


def fits(key: jwt.PyJWK, algorithm: str) -> bool:
    """The key is of the kind that the algorithm takes, and says nothing else itself."""
    if key._jwk_data.get("alg", algorithm) != algorithm:
        return False
    public = key.key
    if algorithm.startswith(("RS", "PS")):
        return isinstance(public, RSAPublicKey) and public.key_size >= SHORTEST_RSA
    if algorithm.startswith("ES"):
        return isinstance(public, EllipticCurvePublicKey) and public.curve.name == _CURVES[algorithm]
    return isinstance(public, Ed25519PublicKey | Ed448PublicKey)


def _key(entry: Any) -> jwt.PyJWK | None:
    """A public key that signs; None for others, and for what is no key."""
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig" or entry.get("kty") not in ("RSA", "EC", "OKP"):
        return None
    try:
        # Never the private half, should the provider show it.
        return jwt.PyJWK({name: value for name, value in entry.items() if name not in _PRIVATE})
    except (jwt.PyJWTError, ValueError, TypeError):
        return None


def _json(client: httpx.Client, address: str) -> dict[str, Any]:
    try:
        with client.stream("GET", address, headers={"accept": "application/json"}) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}")
            data, until = bytearray(), time.monotonic() + 2 * SECONDS
            for piece in answer.iter_bytes(64 << 10):
                data += piece
                if len(data) > MOST_BYTES or time.monotonic() > until:
                    raise ValueError("it is too long, or comes too slowly")
        document = msgspec.json.decode(bytes(data))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(shown(error, 200) or type(error).__name__) from error
    except msgspec.DecodeError as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    return document
