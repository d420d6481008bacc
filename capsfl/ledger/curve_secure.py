"""P-256 through `cryptography` (OpenSSL), the extra `capsfl[secure]`: the same bytes, faster, in constant time."""

from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

_CURVE = ec.SECP256R1()
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def public_key(secret: bytes) -> bytes:
    """Returns the compressed point (33 bytes) of a secret scalar (32 bytes)."""
    return compressed(private(secret))


def sign(secret: bytes, message: bytes) -> bytes:
    """Returns r ‖ s over SHA-256 of the message: deterministic (RFC 6979), with the lower s."""
    der = private(secret).sign(message, ec.ECDSA(SHA256(), deterministic_signing=True))
    r, s = utils.decode_dss_signature(der)
    return r.to_bytes(32, "big") + min(s, _ORDER - s).to_bytes(32, "big")


def verify(point: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Tells whether r ‖ s is the key's over the message; raises nothing."""
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        point.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=256)  # deriving one costs a hundred signatures; the secret is in memory with its signer anyway
def private(secret: bytes) -> ec.EllipticCurvePrivateKey:
    """Returns OpenSSL's key of a secret scalar."""
    return ec.derive_private_key(int.from_bytes(secret, "big"), _CURVE)


@lru_cache(maxsize=256)  # a chain asks for the same few points at every block
def point(public_key: bytes) -> ec.EllipticCurvePublicKey | None:
    """Returns OpenSSL's key of a compressed point, or None where the bytes are not one."""
    if len(public_key) != 33 or public_key[0] not in (2, 3):
        return None
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, public_key)
    except ValueError:
        return None


def generate() -> ec.EllipticCurvePrivateKey:
    """Returns a fresh key that nothing keeps."""
    return ec.generate_private_key(_CURVE)


def compressed(secret: ec.EllipticCurvePrivateKey) -> bytes:
    """Returns the compressed point (33 bytes) of a key."""
    return secret.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def cipher(secret: ec.EllipticCurvePrivateKey, point: ec.EllipticCurvePublicKey, info: bytes) -> AESGCM:
    """Returns AES-256-GCM under what one's secret key and another's public key agree on: ECDH, then HKDF-SHA256."""
    return AESGCM(HKDF(SHA256(), 32, salt=None, info=info).derive(secret.exchange(ec.ECDH(), point)))
