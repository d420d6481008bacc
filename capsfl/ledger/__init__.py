"""A signed, append-only record of what every federated round did, and the means to check it without trust."""

from capsfl.ledger.block import Block, SignedHead
from capsfl.ledger.canonical import decimal
from capsfl.ledger.chain import Ledger
from capsfl.ledger.errors import (
    CanonicalError,
    DamageError,
    Divergence,
    KeyFileError,
    LedgerError,
    LockedError,
    RecordError,
    StorageError,
)
from capsfl.ledger.keys import Signer, Verifier
from capsfl.ledger.records import (
    Genesis,
    Record,
    Registration,
    RoundRecord,
    parameters_root,
    record_id,
    tensor_leaf,
)
from capsfl.ledger.verify import Finding, Status, verify

__all__ = [
    "Block",
    "CanonicalError",
    "DamageError",
    "Divergence",
    "Finding",
    "Genesis",
    "KeyFileError",
    "Ledger",
    "LedgerError",
    "LockedError",
    "Record",
    "RecordError",
    "Registration",
    "RoundRecord",
    "SignedHead",
    "Signer",
    "Status",
    "StorageError",
    "Verifier",
    "decimal",
    "parameters_root",
    "record_id",
    "tensor_leaf",
    "verify",
]
