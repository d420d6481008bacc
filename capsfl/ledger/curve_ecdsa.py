"""P-256 through the pure-Python `ecdsa` package: everywhere, slow, and no defence against side channels."""

from functools import lru_cache
from hashlib import sha256

from ecdsa import NIST256p, SigningKey, VerifyingKey
from ecdsa.util import sigencode_string_canonize


def public_key(secret: bytes) -> bytes:
    """Returns the compressed point (33 bytes) of a secret scalar (32 bytes)."""
    key = _private(secret).get_verifying_key()
    assert isinstance(key, VerifyingKey)
    return key.to_string("compressed")


def sign(secret: bytes, message: bytes) -> bytes:
    """Returns r ‖ s over SHA-256 of the message: deterministic (RFC 6979), with the lower s."""
    return _private(secret).sign_deterministic(message, hashfunc=sha256, sigencode=sigencode_string_canonize)


def verify(point: VerifyingKey, signature: bytes, message: bytes) -> bool:
    """Tells whether r ‖ s is the key's over the message; raises nothing."""
    try:
        return point.verify(signature, message, hashfunc=sha256) is True
    except Exception:  # BadSignatureError, and whatever arithmetic on hostile numbers raises
        return False


def _private(secret: bytes) -> SigningKey:
    return SigningKey.from_string(secret, curve=NIST256p, hashfunc=sha256)


@lru_cache(maxsize=256)  # a chain asks for the same few points at every block
def point(public_key: bytes) -> VerifyingKey | None:
    """Returns the key of a compressed point, or None where the bytes are not one."""
    try:
        return VerifyingKey.from_string(public_key, curve=NIST256p, hashfunc=sha256, valid_encodings=("compressed",))
    except Exception:  # points off the curve raise MalformedPointError, TypeError and others
        return None
