"""ECDSA on P-256 with SHA-256 behind two small classes, `Signer` and `Verifier`.

Signatures are 64 bytes, r ‖ s, deterministic (RFC 6979) and with the lower of the two possible s, so that one
key gives one signature for one message and nobody can turn it into another. What is signed is never a bare
body but its pre-authentication encoding (DSSE 1.0.2), which binds the type of the payload and the chain.

Two curves give the same bytes: `cryptography` where it is installed (`capsfl[secure]`), else `ecdsa`, which
does not defend against side channels (CVE-2024-23342, see SECURITY.md).
"""

import re
import secrets
from functools import cache
from hashlib import sha256
from typing import Any, Protocol

from capsfl.ledger import curve_ecdsa
from capsfl.ledger.errors import LedgerError

SIGNATURE_BYTES = 64
PUBLIC_KEY_BYTES = 33
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

_HOSPITAL_DOMAIN = b"capsfl.hospital.v1\x00"
_CHAIN_DOMAIN = b"capsfl.chain.v1\x00"
_PAYLOAD_TYPE = re.compile(r"[a-z][a-z0-9-]{0,63}")
_CHAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Curve(Protocol):
    """The arithmetic of P-256: `curve_ecdsa` or `curve_secure`."""

    def public_key(self, secret: bytes) -> bytes: ...
    def sign(self, secret: bytes, message: bytes) -> bytes: ...
    def point(self, public_key: bytes) -> Any: ...
    def verify(self, point: Any, signature: bytes, message: bytes) -> bool: ...


@cache
def default_curve() -> Curve:
    """Returns the best curve that is installed."""
    try:
        from capsfl.ledger import curve_secure
    except ImportError:
        return curve_ecdsa
    return curve_secure


def is_chain_id(text: object) -> bool:
    """Tells whether `text` may name a chain: 1 to 64 letters, digits, dots, dashes and underscores."""
    return isinstance(text, str) and _CHAIN_ID.fullmatch(text) is not None


def hospital_id(public_key: bytes) -> str:
    """Returns the identity of a hospital: SHA-256(domain ‖ compressed public key), in hex."""
    return sha256(_HOSPITAL_DOMAIN + public_key).hexdigest()


def chain_binding(chain_id: str, owner_key: bytes) -> str:
    """Returns what hospitals sign as their chain: SHA-256(domain ‖ owner's key ‖ name), in hex.

    Anybody can found a chain of the same name; under the owner's key as well, statements hold on one chain only.
    """
    return sha256(_CHAIN_DOMAIN + owner_key + chain_id.encode()).hexdigest()


def pre_authentication_encoding(payload_type: bytes, body: bytes) -> bytes:
    """Returns DSSE's PAE: "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body, one encoding for one pair."""
    return b"DSSEv1 %d %b %d %b" % (len(payload_type), payload_type, len(body), body)


class Signer:
    """A private key.

    Args:
        private_key: The secret scalar, 32 bytes, big-endian.
        curve: Who computes; the best installed by default.

    Raises:
        LedgerError: not 32 bytes, zero, or not below the order of the group.
    """

    def __init__(self, private_key: bytes, *, curve: Curve | None = None) -> None:
        if len(private_key) != 32 or not 0 < int.from_bytes(private_key, "big") < ORDER:
            raise LedgerError("private_key: not a secret of P-256 (32 bytes, from 1 to the group order - 1)")
        self._secret = bytes(private_key)
        self._curve = curve or default_curve()
        self.public_key = self._curve.public_key(self._secret)  # compressed, 33 bytes

    def __repr__(self) -> str:
        return f"Signer(hospital_id={self.hospital_id()!r})"  # never the secret

    @classmethod
    def generate(cls) -> "Signer":
        """Returns a new key from the operating system's randomness."""
        return cls((1 + secrets.randbelow(ORDER - 1)).to_bytes(32, "big"))

    @property
    def private_key(self) -> bytes:
        """The secret scalar, 32 bytes: for key files and key agreement only."""
        return self._secret

    def hospital_id(self) -> str:
        """Returns the identity this key gives its owner, in hex."""
        return hospital_id(self.public_key)

    def sign(self, payload_type: str, chain_id: str, body: bytes) -> bytes:
        """Returns r ‖ s over the body as a payload of this type on this chain.

        Raises:
            LedgerError: a payload type or chain id that could blur what is signed.
        """
        return self.sign_message(pre_authentication_encoding(_bound_type(payload_type, chain_id), body))

    def sign_message(self, message: bytes) -> bytes:
        """Returns r ‖ s over the bytes as they are: the primitive under `sign`."""
        return self._curve.sign(self._secret, message)


class Verifier:
    """A public key; total: a key or signature that is not one verifies nothing and raises nothing.

    Args:
        public_key: Compressed point, 33 bytes.
        curve: Who computes; the best installed by default.
    """

    def __init__(self, public_key: bytes, *, curve: Curve | None = None) -> None:
        self._curve = curve or default_curve()
        self._point = self._curve.point(public_key) if isinstance(public_key, bytes) else None

    @property
    def is_valid(self) -> bool:
        """Whether the bytes given are a point of the curve."""
        return self._point is not None

    def verify(self, signature: bytes, payload_type: str, chain_id: str, body: bytes) -> bool:
        """Tells whether this key signed this body as this type on this chain."""
        try:
            message = pre_authentication_encoding(_bound_type(payload_type, chain_id), body)
        except (LedgerError, TypeError):
            return False
        return self.verify_message(signature, message)

    def verify_message(self, signature: bytes, message: bytes) -> bool:
        """Tells whether `signature` is this key's r ‖ s over the bytes as they are, with the low s."""
        if self._point is None or not isinstance(signature, bytes) or len(signature) != SIGNATURE_BYTES:
            return False
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
        if not (0 < r < ORDER and 0 < s <= ORDER // 2):
            return False
        return self._curve.verify(self._point, signature, message)


def _bound_type(payload_type: str, chain_id: str) -> bytes:
    # Neither part can hold ";", so the pair reads back in one way only.
    if not isinstance(payload_type, str) or _PAYLOAD_TYPE.fullmatch(payload_type) is None:
        raise LedgerError(f"payload type {payload_type!r}: use lower-case letters, digits and dashes")
    if not is_chain_id(chain_id):
        raise LedgerError(f"chain id {chain_id!r}: use 1 to 64 letters, digits, dots, dashes and underscores")
    return f"application/vnd.capsfl.{payload_type}.v1+json;chain={chain_id}".encode("ascii")
