"""A signed, append-only record of what every federated round did, and the means to check it without trust."""

# fmt: off
from capsfl.ledger.block import Block, SignedHead
from capsfl.ledger.canonical import decimal
from capsfl.ledger.chain import Ledger
from capsfl.ledger.consensus import ConsensusRules, decide, leader_of, tally
from capsfl.ledger.directory import Directory, attribute_distance, xor_distance
from capsfl.ledger.errors import (
    CanonicalError,
    DamageError,
    Divergence,
    KeyFileError,
    LedgerError,
    LockedError,
    RecordError,
    SealError,
    StorageError,
    VersionError,
)
from capsfl.ledger.keyfiles import load_key, save_key
from capsfl.ledger.keys import Signer, Verifier, chain_binding
from capsfl.ledger.records import Genesis, Record, RoundRecord, parameters_root, record_id, tensor_leaf
from capsfl.ledger.sealing import seal, unseal
from capsfl.ledger.sharing import AccessPolicy, RetrievalGrant, RetrievalRequest
from capsfl.ledger.statements import (
    Ballot,
    Commitment,
    Decision,
    Registration,
    Revocation,
    Rotation,
    commit,
    opens,
)
from capsfl.ledger.verify import Finding, Status, verify

__all__ = [
    "AccessPolicy", "Ballot", "Block", "CanonicalError", "Commitment", "ConsensusRules", "DamageError", "Decision",
    "Directory", "Divergence", "Finding", "Genesis", "KeyFileError", "Ledger", "LedgerError", "LockedError", "Record",
    "RecordError", "Registration", "RetrievalGrant", "RetrievalRequest", "Revocation", "Rotation", "RoundRecord",
    "SealError", "SignedHead", "Signer", "Status", "StorageError", "Verifier", "VersionError", "attribute_distance",
    "chain_binding", "commit", "decide", "decimal", "leader_of", "load_key", "opens", "parameters_root", "record_id",
    "save_key", "seal", "tally", "tensor_leaf", "unseal", "verify", "xor_distance",
]
