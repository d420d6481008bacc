"""What can go wrong with a ledger, each with one line that says where and what to do."""

from pathlib import Path


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
    """Two histories, or two runs of one round, that should agree do not.

    Attributes:
        task: Task of the round, or None when no round is involved.
        round: Number of the round, or None.
        leaf: Path of the first tensor that differs, or None when something other than a tensor does.
    """

    def __init__(
        self, message: str, *, task: str | None = None, round: int | None = None, leaf: str | None = None
    ) -> None:
        super().__init__(message)
        self.task = task
        self.round = round
        self.leaf = leaf


class SealError(LedgerError):
    """A seal cannot be made or opened."""


class StorageError(LedgerError):
    """The file system refused (full, read-only, not a regular file); the outcome is old or new, never torn.

    Attributes:
        path: The file or folder concerned; optional so that the error can cross processes.
    """

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class LockedError(StorageError):
    """Another writer holds the ledger."""
