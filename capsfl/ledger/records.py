"""What a ledger records: who owns it, which hospitals take part, and what every round did.

Each record is a frozen value that checks itself when it is made, whether by us or from a stranger's bytes,
and has one canonical form (`to_canonical`), so its identity is the hash of that form.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar, get_args

from capsfl.ledger import canonical, merkle
from capsfl.ledger.consensus import ConsensusRules, Decision
from capsfl.ledger.errors import RecordError
from capsfl.ledger.fields import (
    check_count,
    check_digest,
    check_digests,
    check_figure,
    check_name,
    check_path,
    check_patients,
    check_public_key,
    require,
    shorten,
)
from capsfl.ledger.keys import hospital_id, is_chain_id
from capsfl.ledger.sharing import AccessPolicy, RetrievalGrant, RetrievalRequest
from capsfl.ledger.statements import Ballot, Commitment, Revocation, Rotation

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
class Genesis:
    """The first record of a chain: its name and the key that signs its blocks.

    Attributes:
        chain_id: Name of the chain, 1 to 64 letters, digits, dots, dashes and underscores.
        public_key: Compressed P-256 point (33 bytes) of the chain's owner.
    """

    type: ClassVar[str] = "genesis"
    chain_id: str
    public_key: bytes

    def __post_init__(self) -> None:
        require(is_chain_id(self.chain_id), "genesis.chain_id", self.chain_id, "use letters, digits, . _ -")
        check_public_key("genesis.public_key", self.public_key)

    def to_canonical(self) -> dict[str, Any]:
        """Returns the record as a canonical object."""
        return {"type": self.type, "chain_id": self.chain_id, "public_key": self.public_key.hex()}


@dataclass(frozen=True)
class Registration:
    """A hospital joins the chain.

    Attributes:
        hospital_id: SHA-256(domain ‖ compressed public key), in hex: `Signer.hospital_id()`.
        name: Short name, unique in the chain whatever its case.
        public_key: Compressed P-256 point, 33 bytes.
        kind: Kind of data the hospital holds (its community), such as "lung CT".
        records: Number of records (scans or slices) it holds.
    """

    type: ClassVar[str] = "registration"
    hospital_id: str
    name: str
    public_key: bytes
    kind: str
    records: int

    def __post_init__(self) -> None:
        check_public_key("registration.public_key", self.public_key)
        expected = hospital_id(self.public_key)
        require(
            self.hospital_id == expected,
            "registration.hospital_id",
            self.hospital_id,
            f"this key's is {expected}",
        )
        check_name("registration.name", self.name)
        check_name("registration.kind", self.kind)
        check_count("registration.records", self.records)

    def to_canonical(self) -> dict[str, Any]:
        """Returns the record as a canonical object."""
        return {
            "type": self.type,
            "hospital_id": self.hospital_id,
            "name": self.name,
            "public_key": self.public_key.hex(),
            "kind": self.kind,
            "records": self.records,
        }


@dataclass(frozen=True)
class RoundRecord:
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
        manifest: Pairs of checkpoint file path and SHA-256 in hex, sorted by path; optional.
        patients: Where patients are the unit of privacy, triples of hospital, number of its patients that this task
            draws from, and their epsilon so far (None when unbounded), sorted by hospital; else None.
    """

    type: ClassVar[str] = "round"
    round: int
    task: str
    parameters_digest: str
    leaves: tuple[tuple[str, str], ...]
    cohort: tuple[str, ...]
    sampler: str
    clip_norm: str | None
    noise_multiplier: str | None
    expected_cohort: str | None
    epsilon: str | None
    delta: str | None
    configuration_hash: str
    code_version: str
    manifest: tuple[tuple[str, str], ...] | None = None
    patients: tuple[tuple[str, int, str | None], ...] | None = None

    def __post_init__(self) -> None:
        check_count("round.round", self.round)
        for field in ("task", "sampler", "code_version"):
            check_name(f"round.{field}", getattr(self, field))
        check_digests("round.leaves", self.leaves)
        check_digest("round.parameters_digest", self.parameters_digest)
        root = parameters_root(dict(self.leaves))
        require(
            self.parameters_digest == root,
            "round.parameters_digest",
            self.parameters_digest,
            f"the leaves give {root}",
        )
        require(type(self.cohort) is tuple, "round.cohort", self.cohort, "give a tuple of names")
        for hospital in self.cohort:
            check_name("round.cohort", hospital)
        require(len(set(self.cohort)) == len(self.cohort), "round.cohort", self.cohort, "name a hospital once")
        for field in ("clip_norm", "noise_multiplier", "expected_cohort", "epsilon", "delta"):
            check_figure(f"round.{field}", getattr(self, field))
        check_digest("round.configuration_hash", self.configuration_hash)
        if self.manifest is not None:
            check_digests("round.manifest", self.manifest)
            paths = {path.casefold() for path, _ in self.manifest}
            require(
                len(paths) == len(self.manifest),
                "round.manifest",
                self.manifest,
                "two paths differ only in case",
            )
        if self.patients is not None:
            check_patients("round.patients", self.patients)

    def to_canonical(self) -> dict[str, Any]:
        """Returns the record as a canonical object."""
        value = {
            "type": self.type,
            "round": self.round,
            "task": self.task,
            "parameters_digest": self.parameters_digest,
            "leaves": [list(leaf) for leaf in self.leaves],
            "cohort": list(self.cohort),
            "sampler": self.sampler,
            "clip_norm": self.clip_norm,
            "noise_multiplier": self.noise_multiplier,
            "expected_cohort": self.expected_cohort,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "configuration_hash": self.configuration_hash,
            "code_version": self.code_version,
        }
        if self.manifest is not None:
            value["manifest"] = [list(file) for file in self.manifest]
        if self.patients is not None:
            value["patients"] = [list(row) for row in self.patients]
        return value


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
_SIGNATURES = ("signature", "countersignature", "possession")


def from_canonical(value: object) -> Record:
    """Returns the record whose canonical object is `value`.

    Raises:
        RecordError: an unknown type, a missing or unknown field, or a field that may not say what it says.
    """
    if not isinstance(value, dict):
        raise RecordError(f"a record is an object, not a {type(value).__name__}")
    fields = {key: _from_json(key, item) for key, item in value.items() if key != "type"}
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RecordError(f"record type {shorten(kind)} is not one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](**fields)
    except TypeError:
        expected = ", ".join(_KINDS[kind].__dataclass_fields__)
        raise RecordError(f"{kind}: fields {shorten(sorted(fields))}: expected {expected}") from None


def record_id(record: Record) -> str:
    """Returns SHA-256(domain ‖ canonical bytes), in hex: the identity under which an append is idempotent.

    Signatures are not part of it: whoever signs a statement again has not made another one.
    """
    value = {key: item for key, item in record.to_canonical().items() if key not in _SIGNATURES}
    return sha256(_RECORD_DOMAIN + canonical.encode(value)).hexdigest()


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
