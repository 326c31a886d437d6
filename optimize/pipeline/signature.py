"""A manifest that is signed: `manifest.json.sig` beside it, as `cosign sign-blob --key` writes it.

The signature is over the bytes of manifest.json, which holds the digest of every file of the export. Keys are PEM files
of an ECDSA (P-256, SHA-256) or Ed25519 key without a password; the signature is base64.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from optimize.errors import Differs, Refused
from optimize.pipeline.manifest import NAME

SIGNATURE = f"{NAME}.sig"
CURVE = ec.ECDSA(hashes.SHA256())
Private = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
Public = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


def private_key(file: Path) -> Private:
    """The key that signs; Refused when the file holds none."""
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise Refused(f"{file} is no private key in PEM without a password: {error}") from error
    if not isinstance(key, Private):
        raise Refused(f"{file} is a key of another kind: ECDSA (P-256) and Ed25519 are taken")
    return key


def write(folder: Path, key: Private) -> None:
    """Sign the manifest of the export in `folder`."""
    data = (folder / NAME).read_bytes()
    made = key.sign(data, CURVE) if isinstance(key, ec.EllipticCurvePrivateKey) else key.sign(data)
    (folder / SIGNATURE).write_text(base64.b64encode(made).decode() + "\n")


def check(folder: Path, file: Path) -> None:
    """Differs when the manifest is not what the owner of the public key in `file` signed."""
    try:
        key = serialization.load_pem_public_key(file.read_bytes())
    except (OSError, ValueError) as error:
        raise Refused(f"{file} is no public key in PEM: {error}") from error
    if not isinstance(key, Public):
        raise Refused(f"{file} is a key of another kind: ECDSA (P-256) and Ed25519 are taken")
    try:
        said = base64.b64decode((folder / SIGNATURE).read_text(), validate=False)
        data = (folder / NAME).read_bytes()
        key.verify(said, data, CURVE) if isinstance(key, ec.EllipticCurvePublicKey) else key.verify(said, data)
    except OSError as error:
        raise Differs(f"the export is not signed: {error}") from error
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise Differs(f"the manifest is not what the owner of {file} signed") from error
