"""What can go wrong with a ledger, each with one line that says where and what to do."""


class LedgerError(ValueError):
    """The root of every error this package raises for bad input, bad files and bad records."""


class CanonicalError(LedgerError):
    """A value or its bytes are outside the canonical form."""


class RecordError(LedgerError):
    """A field of a record is outside what a record may say."""


class KeyFileError(LedgerError):
    """A private key file is missing, readable by others, or not a P-256 key."""


class DamageError(LedgerError):
    """Committed bytes do not say what was signed.

    Attributes:
        height: First block that is wrong, or None when the damage has no height (the head file).
    """

    def __init__(self, message: str, *, height: int | None = None) -> None:
        super().__init__(message)
        self.height = height


class VersionError(DamageError):
    """Bytes that another version of capsfl wrote."""


class Divergence(LedgerError):
    """Two histories, or two runs of one round, that should agree do not; names the first tensor that differs."""


class SealError(LedgerError):
    """A seal cannot be made or opened."""


class StorageError(LedgerError):
    """The file system refused (full, read-only, not a regular file); the outcome is old or new, never torn."""


class LockedError(StorageError):
    """Another writer holds the ledger."""
