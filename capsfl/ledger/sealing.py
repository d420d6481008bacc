"""A model sealed to one hospital's key: ECDH on P-256, HKDF-SHA256, AES-256-GCM (through `capsfl[secure]`).

    sealed = "capsfl.seal.v1\\0" ‖ ephemeral public key (33) ‖ AES-GCM ciphertext and tag

A fresh ephemeral key gives every seal a key of its own, so the nonce is fixed. Both public keys, the chain and
the context enter the key and the authenticated data: bytes sealed for one purpose open for no other.
"""

from importlib import import_module
from types import ModuleType

from capsfl.ledger import canonical
from capsfl.ledger.errors import SealError
from capsfl.ledger.keys import PUBLIC_KEY_BYTES, Signer

_MAGIC = b"capsfl.seal.v1\x00"
_NONCE = bytes(12)
OVERHEAD_BYTES = len(_MAGIC) + PUBLIC_KEY_BYTES + 16


def seal(data: bytes, public_key: bytes, *, chain_id: str, context: str) -> bytes:
    """Returns `data` sealed to a public key.

    Args:
        data: what to seal.
        public_key: compressed point (33 bytes) of the recipient.
        chain_id: the chain on which the grant is recorded.
        context: what the seal is for, such as the record id of the request.

    Raises:
        SealError: the key is not a point, or `capsfl[secure]` is not installed.
    """
    curve = _secure()
    recipient = curve.point(public_key)
    if recipient is None:
        raise SealError("public_key: not a compressed point of P-256: take it from the requester's registration")
    secret = curve.generate()
    ephemeral = curve.compressed(secret)
    bound = _bound(ephemeral, public_key, chain_id, context)
    return _MAGIC + ephemeral + curve.cipher(secret, recipient, bound).encrypt(_NONCE, data, bound)


def unseal(sealed: bytes, signer: Signer, *, chain_id: str, context: str) -> bytes:
    """Returns what was sealed to this key, for this chain and context.

    Raises:
        SealError: not a seal, sealed to another key or purpose, changed, or `capsfl[secure]` is not installed.
    """
    curve = _secure()
    start = len(_MAGIC) + PUBLIC_KEY_BYTES
    ephemeral = sealed[len(_MAGIC) : start]
    point = curve.point(ephemeral)
    if not sealed.startswith(_MAGIC) or len(sealed) < OVERHEAD_BYTES or point is None:
        raise SealError("not a sealed model: give the bytes that the grant names")
    bound = _bound(ephemeral, signer.public_key, chain_id, context)
    from cryptography.exceptions import InvalidTag

    try:
        return curve.cipher(curve.private(signer.private_key), point, bound).decrypt(_NONCE, sealed[start:], bound)
    except InvalidTag:
        raise SealError("the seal does not open: sealed to another key or purpose, or changed on the way") from None


def _bound(ephemeral: bytes, recipient: bytes, chain_id: str, context: str) -> bytes:
    return _MAGIC + canonical.encode([ephemeral.hex(), recipient.hex(), chain_id, context])


def _secure() -> ModuleType:
    try:
        return import_module("capsfl.ledger.curve_secure")
    except ImportError:
        raise SealError(
            "sealing needs the extra: pip install 'capsfl[secure]'; there is no cipher of our own"
        ) from None
