"""Private keys in files: PKCS #8 PEM, mode 0600, encrypted under a passphrase where `capsfl[secure]` is installed."""

import os
from hashlib import sha256
from pathlib import Path

from ecdsa import NIST256p, SigningKey

from capsfl.ledger import storage
from capsfl.ledger.errors import KeyFileError, StorageError
from capsfl.ledger.keys import Signer

_MAX_BYTES = 4096
_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def load_key(path: Path | str, passphrase: bytes | None = None) -> Signer:
    """Returns the key in a PEM file that `save_key` wrote.

    Args:
        path: the file.
        passphrase: of an encrypted file; ignored for a plain one.

    Raises:
        KeyFileError: no such file, not a regular file, readable by others, not a P-256 key, or encrypted and the
            passphrase is missing or wrong.
    """
    path = Path(path)
    try:
        with storage.open_stream(path) as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise KeyFileError(f"{path}: readable by others: run chmod 600 on it")
            pem = file.read(_MAX_BYTES + 1)
    except StorageError as error:
        raise KeyFileError(f"{error}: no key to read there") from None
    if pem.startswith(_ENCRYPTED):
        return Signer(_decrypted(path, pem, passphrase))
    try:
        if len(pem) > _MAX_BYTES:
            raise ValueError
        key = SigningKey.from_pem(pem.decode("ascii"), hashfunc=sha256)
        if key.curve != NIST256p:
            raise ValueError
        return Signer(key.to_string())
    except Exception:  # the parser raises half a dozen types on hostile input
        raise KeyFileError(f"{path}: not the PEM of a P-256 private key") from None


def save_key(signer: Signer, path: Path | str, passphrase: bytes | None = None) -> None:
    """Writes a key as PKCS #8 PEM, mode 0600, whole or not at all, and never over another file.

    Args:
        signer: the key.
        path: the file.
        passphrase: encrypts the file (PBES2, AES-256-CBC, scrypt or PBKDF2 as OpenSSL chooses).

    Raises:
        KeyFileError: the file exists, the file system refuses, or encryption is asked for without the extra.
    """
    path = Path(path)
    if passphrase is not None:
        pem = _encrypted(path, signer, passphrase)
    else:
        pem = SigningKey.from_string(signer.private_key, NIST256p, sha256).to_pem(format="pkcs8")
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with storage.surfaced(path):
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(pem)
                    file.flush()
                    os.fsync(descriptor)
                os.link(draft, path)  # unlike a rename, a link never replaces a key that is already there
            finally:
                os.unlink(draft)
        storage.sync_folder(path.parent)
    except StorageError as error:
        raise KeyFileError(f"{error}: choose another place for the key") from None


def open_key(path: Path) -> Signer:
    """Loads a key, or makes it where there is none; encrypted where CAPSFL_KEY_PASSPHRASE is set.

    Raises:
        KeyFileError: see `load_key` and `save_key`.
    """
    passphrase = os.environ.get("CAPSFL_KEY_PASSPHRASE", "").encode() or None
    for draft in path.parent.glob(f".{path.name}.*.tmp"):
        draft.unlink(missing_ok=True)  # a secret that a kill left half-way to its name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_key(Signer.generate(), path, passphrase)
    return load_key(path, passphrase)


def _encrypted(path: Path, signer: Signer, passphrase: bytes) -> bytes:
    try:
        from cryptography.hazmat.primitives import serialization

        from capsfl.ledger.curve_secure import private
    except ImportError:
        raise KeyFileError(
            f"{path}: a passphrase needs the extra: pip install 'capsfl[secure]', or leave the passphrase out"
        ) from None
    if not passphrase:
        raise KeyFileError(f"{path}: an empty passphrase protects nothing: give one, or None")
    return private(signer.private_key).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase),
    )


def _decrypted(path: Path, pem: bytes, passphrase: bytes | None) -> bytes:
    if not passphrase:
        raise KeyFileError(f"{path}: encrypted: set CAPSFL_KEY_PASSPHRASE to its passphrase")
    try:
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError:
        raise KeyFileError(f"{path}: encrypted, which needs the extra: pip install 'capsfl[secure]'") from None
    try:
        key = load_pem_private_key(pem, passphrase)
    except Exception:  # a wrong passphrase and a broken file raise ValueError, TypeError, UnsupportedAlgorithm
        raise KeyFileError(f"{path}: the passphrase does not open it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise KeyFileError(f"{path}: not a P-256 private key")
    return key.private_numbers().private_value.to_bytes(32, "big")
