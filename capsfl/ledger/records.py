"""What a ledger records: who owns it, which hospitals take part, and what every round did.

Each record is a frozen value that checks itself when it is made, whether by us or from a stranger's bytes,
and has one canonical form (`to_canonical`), so its identity is the hash of that form.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, ClassVar, get_args

from capsfl.ledger import canonical, merkle
from capsfl.ledger.consensus import ConsensusRules
from capsfl.ledger.errors import RecordError
from capsfl.ledger.fields import (
    Cohort,
    Count,
    Digest,
    Digests,
    Figure,
    Name,
    Patients,
    PublicKey,
    check_count,
    check_path,
    check_that,
    require,
    shorten,
)
from capsfl.ledger.form import Form
from capsfl.ledger.keys import is_chain_id
from capsfl.ledger.sharing import AccessPolicy, RetrievalGrant, RetrievalRequest
from capsfl.ledger.statements import Ballot, Commitment, Decision, Registration, Revocation, Rotation

_RECORD_DOMAIN = b"capsfl.record.v1\x00"

# Bytes per element of the types a checkpoint may hold, so that a leaf cannot claim a shape its bytes lack.
_DTYPE_BYTES = {
    "bool": 1,
    "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
    "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Genesis(Form):
    """The first record of a chain: its name and the key that signs its blocks.

    Attributes:
        chain_id: Name of the chain, 1 to 64 letters, digits, dots, dashes and underscores.
        public_key: Compressed P-256 point (33 bytes) of the chain's owner.
    """

    type: ClassVar[str] = "genesis"
    chain_id: Annotated[str, check_that(is_chain_id, "use letters, digits, . _ -")]
    public_key: PublicKey


@dataclass(frozen=True)
class RoundRecord(Form):
    """What one federated round did, and the model that came out of it.

    Figures are decimal strings (`canonical.decimal`), None where there is none (no clipping, no noise).

    Attributes:
        round: Number of the round within its task, from 0.
        task: Name of the task, such as "segmentation".
        parameters_digest: Merkle root over the leaves, in hex: `parameters_root(leaves)`.
        leaves: Pairs of tensor path and leaf hash in hex (`tensor_leaf`), sorted by path.
        cohort: Names or ids of the registered hospitals that took part; may be empty under Poisson sampling.
        sampler: How the cohort was drawn.
        clip_norm: Bound on the L2 norm of a hospital's update in this round, or of a patient's gradient.
        noise_multiplier: Noise standard deviation over the clip norm.
        expected_cohort: Number of hospitals expected in a round, the divisor of the sum.
        epsilon: Privacy loss of the run up to and including this round; of the worst hospital, where patients are the
            unit.
        delta: The delta of that epsilon.
        configuration_hash: SHA-256 of the run's configuration, in hex.
        code_version: Version of the code that ran.
        patients: Where patients are the unit of privacy, triples of hospital, number of its patients that this task
            draws from, and their epsilon so far (None when unbounded), sorted by hospital; else None.
    """

    type: ClassVar[str] = "round"
    round: Count
    task: Name
    parameters_digest: Digest
    leaves: Digests
    cohort: Cohort
    sampler: Name
    clip_norm: Figure
    noise_multiplier: Figure
    expected_cohort: Figure
    epsilon: Figure
    delta: Figure
    configuration_hash: Digest
    code_version: Name
    patients: Patients = None

    def __post_init__(self) -> None:
        super().__post_init__()
        root = parameters_root(dict(self.leaves))
        require(
            self.parameters_digest == root, "round.parameters_digest", self.parameters_digest, f"the leaves give {root}"
        )


Record = (
    Genesis
    | ConsensusRules
    | Registration
    | Rotation
    | Revocation
    | Commitment
    | Ballot
    | Decision
    | RoundRecord
    | AccessPolicy
    | RetrievalRequest
    | RetrievalGrant
)
_KINDS: dict[str, type[Record]] = {kind.type: kind for kind in get_args(Record)}


def from_canonical(value: object, kinds: Mapping[str, type[Any]] = _KINDS) -> Any:
    """Returns the record, or other form of these kinds, whose canonical object is `value`.

    Raises:
        RecordError: an unknown type, a missing or unknown field, or a field that may not say what it says.
    """
    if not isinstance(value, dict):
        raise RecordError(f"a record is an object, not a {type(value).__name__}")
    fields = {key: _from_json(key, item) for key, item in value.items() if key != "type"}
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise RecordError(f"record type {shorten(kind)} is not one of {', '.join(kinds)}")
    try:
        return kinds[kind](**fields)
    except TypeError:
        expected = ", ".join(kinds[kind].__dataclass_fields__)
        raise RecordError(f"{kind}: fields {shorten(sorted(fields))}: expected {expected}") from None


def record_leaf(record: Record) -> bytes:
    """Returns the leaf hash of a record in its block's Merkle tree, signatures included."""
    return merkle.leaf_hash(canonical.encode(record.to_canonical()))


def record_id(record: Record) -> str:
    """Returns SHA-256(domain ‖ canonical bytes), in hex: the identity under which an append is idempotent.

    Signatures are not part of it: whoever signs a statement again has not made another one.
    """
    return sha256(_RECORD_DOMAIN + canonical.encode(record.body())).hexdigest()


def tensor_leaf(path: str, dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> bytes:
    """Returns the RFC 6962 leaf hash of one tensor: its path, dtype and shape as well as its values.

    The leaf is LEN(header) as 8 bytes big-endian ‖ header ‖ data, the header being the canonical object of
    path, dtype and shape. Equal values under another name, type or shape therefore hash differently.

    Args:
        path: Name of the tensor in the checkpoint, parts separated by "/".
        dtype: NumPy's name of the type, such as "float32" or "bfloat16".
        shape: Sizes of the dimensions; `()` for a scalar.
        data: The elements, little-endian, in C order.

    Raises:
        RecordError: an unknown dtype, a bad path or shape, or data of another length than they demand.
    """
    check_path("leaf.path", path)
    require(dtype in _DTYPE_BYTES, "leaf.dtype", dtype, f"use one of {', '.join(_DTYPE_BYTES)}")
    for size in shape:
        check_count("leaf.shape", size)
    header = canonical.encode({"type": "tensor.v1", "path": path, "dtype": dtype, "shape": list(shape)})
    view = memoryview(data)
    expected = math.prod(shape) * _DTYPE_BYTES[dtype]
    require(view.nbytes == expected, "leaf.data", f"{view.nbytes} bytes", f"{dtype}{list(shape)} has {expected}")
    require(view.c_contiguous, "leaf.data", path, "give its elements in C order without gaps")
    # The streamed form of merkle.leaf_hash: a tensor of gigabytes is not copied to be hashed.
    digest = sha256(b"\x00" + len(header).to_bytes(8, "big") + header)
    digest.update(view)
    return digest.digest()


def parameters_root(leaves: Mapping[str, str]) -> str:
    """Returns the Merkle root, in hex, over leaf hashes (hex) sorted by tensor path."""
    return merkle.root([bytes.fromhex(leaves[path]) for path in sorted(leaves)]).hex()


def _from_json(key: str, item: Any) -> Any:
    if isinstance(item, list):
        return tuple(tuple(part) if isinstance(part, list) else part for part in item)
    if key == "public_key":
        require(isinstance(item, str) and re.fullmatch("[0-9a-f]{66}", item), key, item, "use 66 hex digits")
        return bytes.fromhex(item)
    return item
