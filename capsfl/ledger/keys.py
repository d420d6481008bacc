"""ECDSA on P-256 with SHA-256 behind two small classes, `Signer` and `Verifier`.

Signatures are 64 bytes, r ‖ s, deterministic (RFC 6979) and with the lower of the two possible s, so that one
key gives one signature for one message and nobody can turn it into another. What is signed is never a bare
body but its pre-authentication encoding (DSSE 1.0.2), which binds the type of the payload and the chain.

The `ecdsa` package does not defend against side channels (CVE-2024-23342, see SECURITY.md).
"""

import os
import re
import stat
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from ecdsa import NIST256p, SigningKey, VerifyingKey
from ecdsa.util import sigencode_string_canonize

from capsfl.ledger.errors import KeyFileError, LedgerError

SIGNATURE_BYTES = 64
PUBLIC_KEY_BYTES = 33

_ORDER: int = NIST256p.order
_HOSPITAL_DOMAIN = b"capsfl.hospital.v1\x00"
_PAYLOAD_TYPE = re.compile(r"[a-z][a-z0-9-]{0,63}")
_CHAIN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_KEY_FILE_BYTES = 4096


def is_chain_id(text: object) -> bool:
    """Tells whether `text` may name a chain: 1 to 64 letters, digits, dots, dashes and underscores."""
    return isinstance(text, str) and _CHAIN_ID.fullmatch(text) is not None


def hospital_id(public_key: bytes) -> str:
    """Returns the identity of a hospital: SHA-256(domain ‖ compressed public key), in hex."""
    return sha256(_HOSPITAL_DOMAIN + public_key).hexdigest()


def pre_authentication_encoding(payload_type: bytes, body: bytes) -> bytes:
    """Returns DSSE's PAE: "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body, one encoding for one pair."""
    return b"DSSEv1 %d %b %d %b" % (len(payload_type), payload_type, len(body), body)


class Signer:
    """A private key.

    Args:
        private_key: The secret scalar, 32 bytes, big-endian.

    Raises:
        LedgerError: not 32 bytes, zero, or not below the order of the group.
    """

    def __init__(self, private_key: bytes) -> None:
        if len(private_key) != 32 or not 0 < int.from_bytes(private_key, "big") < _ORDER:
            raise LedgerError("private_key: not a secret of P-256 (32 bytes, from 1 to the group order - 1)")
        self._key = SigningKey.from_string(private_key, curve=NIST256p, hashfunc=sha256)

    def __repr__(self) -> str:
        return f"Signer(hospital_id={self.hospital_id()!r})"  # never the secret

    @classmethod
    def generate(cls) -> "Signer":
        """Returns a new key from the operating system's randomness."""
        return cls(SigningKey.generate(curve=NIST256p).to_string())

    @classmethod
    def load(cls, path: Path | str) -> "Signer":
        """Returns the key in a PEM file that `save` wrote.

        Raises:
            KeyFileError: no such file, not a regular file, readable by others, or not a P-256 key.
        """
        path = Path(path)
        try:
            # O_NONBLOCK: a FIFO in the file's place must not hang the caller.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise KeyFileError(f"{path}: not a regular file")
                if status.st_mode & 0o077:
                    raise KeyFileError(f"{path}: readable by others: run chmod 600 on it")
                pem = file.read(_MAX_KEY_FILE_BYTES + 1)
        except OSError as error:
            raise KeyFileError(f"{path}: {error.strerror}: no key to read there") from None
        try:
            if len(pem) > _MAX_KEY_FILE_BYTES:
                raise ValueError
            key = SigningKey.from_pem(pem, hashfunc=sha256)
            if key.curve != NIST256p:
                raise ValueError
            return cls(key.to_string())
        except Exception:  # the parser raises half a dozen types on hostile input
            raise KeyFileError(f"{path}: not the PEM of a P-256 private key") from None

    def save(self, path: Path | str) -> None:
        """Writes the key as PKCS #8 PEM, mode 0600, whole or not at all, and never over another file.

        Raises:
            KeyFileError: the file exists, or the file system refuses.
        """
        path = Path(path)
        pem = self._key.to_pem(format="pkcs8")
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(pem)
                    file.flush()
                    os.fsync(descriptor)
                os.link(draft, path)  # unlike a rename, a link never replaces a key that is already there
            finally:
                os.unlink(draft)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise KeyFileError(f"{path}: {error.strerror}: choose another place for the key") from None

    @property
    def public_key(self) -> bytes:
        """The public key, compressed (33 bytes)."""
        key = self._key.get_verifying_key()
        assert isinstance(key, VerifyingKey)
        return key.to_string("compressed")

    def hospital_id(self) -> str:
        """Returns the identity this key gives its owner, in hex."""
        return hospital_id(self.public_key)

    def sign(self, payload_type: str, chain_id: str, body: bytes) -> bytes:
        """Returns a 64-byte signature over the body, its type and the chain it belongs to.

        Raises:
            LedgerError: the type or the chain id holds characters that could blur the border between them.
        """
        return self.sign_message(pre_authentication_encoding(_bound_type(payload_type, chain_id), body))

    def sign_message(self, message: bytes) -> bytes:
        """Returns r ‖ s over SHA-256 of the bytes as they are: the primitive under `sign`."""
        return self._key.sign_deterministic(message, hashfunc=sha256, sigencode=sigencode_string_canonize)


class Verifier:
    """A public key; total: a key or signature that is not one verifies nothing and raises nothing.

    Args:
        public_key: Compressed point, 33 bytes.
    """

    def __init__(self, public_key: bytes) -> None:
        self._key = _parse_point(public_key) if isinstance(public_key, bytes) else None

    @property
    def is_valid(self) -> bool:
        """Whether the bytes given are a point of the curve."""
        return self._key is not None

    def verify(self, signature: bytes, payload_type: str, chain_id: str, body: bytes) -> bool:
        """Tells whether this key signed this body as this type on this chain."""
        try:
            message = pre_authentication_encoding(_bound_type(payload_type, chain_id), body)
        except (LedgerError, TypeError):
            return False
        return self.verify_message(signature, message)

    def verify_message(self, signature: bytes, message: bytes) -> bool:
        """Tells whether `signature` is this key's r ‖ s over the bytes as they are, with the low s."""
        try:
            if self._key is None or len(signature) != SIGNATURE_BYTES:
                return False
            if int.from_bytes(signature[32:], "big") > _ORDER // 2:
                return False
            return self._key.verify(signature, message, hashfunc=sha256) is True
        except Exception:  # BadSignatureError, and whatever arithmetic on hostile numbers raises
            return False


@lru_cache(maxsize=256)  # a chain asks for its owner's point at every block
def _parse_point(public_key: bytes) -> VerifyingKey | None:
    try:
        return VerifyingKey.from_string(public_key, curve=NIST256p, hashfunc=sha256, valid_encodings=("compressed",))
    except Exception:  # points off the curve raise MalformedPointError, TypeError and others
        return None


def _bound_type(payload_type: str, chain_id: str) -> bytes:
    # Neither part can hold ";", so the pair reads back in one way only.
    if not isinstance(payload_type, str) or _PAYLOAD_TYPE.fullmatch(payload_type) is None:
        raise LedgerError(f"payload type {payload_type!r}: use lower-case letters, digits and dashes")
    if not is_chain_id(chain_id):
        raise LedgerError(f"chain id {chain_id!r}: use 1 to 64 letters, digits, dots, dashes and underscores")
    return f"application/vnd.capsfl.{payload_type}.v1+json;chain={chain_id}".encode("ascii")
