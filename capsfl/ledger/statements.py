"""What hospitals sign for themselves: commitments to updates, ballots, decisions, and changes of their keys.

A statement binds the chain, its own type, the hospital and a nonce, and where it speaks of a round, task and
round as well; a signature copied to another round, chain or type verifies nowhere. The identity of a statement
excludes its signatures.
"""

import hmac
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, ClassVar, Self

from capsfl.ledger import canonical
from capsfl.ledger.fields import Count, Digest, Errors, Figures, Name, Nonce, PublicKey, Signature, require
from capsfl.ledger.form import Form
from capsfl.ledger.keys import Signer, Verifier, hospital_id


class Statement(Form):
    """A record that a hospital signs; `signed` fills the signature in, `is_signed` checks it.

    Attributes:
        hospital: Id of the hospital that signs.
        signature: r ‖ s of its key over the body, in hex.
    """

    hospital: str
    signature: str

    def signed(self, signer: Signer, chain_id: str) -> Self:
        """Returns the statement with the signer's signature on this chain."""
        return _with(self, "signature", signer.sign(self.type, chain_id, canonical.encode(self.body())))

    def is_signed(self, public_key: bytes, chain_id: str) -> bool:
        """Tells whether this key signed the statement on this chain."""
        return _verifies(public_key, self.signature, self.type, chain_id, self.body())


class Possession(Form):
    """A record that brings a key into the chain, signed by that key too: nobody enters another's as his own.

    Attributes:
        public_key: Compressed P-256 point, 33 bytes.
        possession: r ‖ s of that key over the body, in hex.
    """

    public_key: bytes
    possession: str

    def proven(self, key: Signer, chain_id: str) -> Self:
        """Returns the record with the signature of the key that it brings."""
        return _with(self, "possession", key.sign("possession", chain_id, canonical.encode(self.body())))

    def is_proven(self, chain_id: str) -> bool:
        """Tells whether the key signed the record on this chain."""
        return _verifies(self.public_key, self.possession, "possession", chain_id, self.body())


@dataclass(frozen=True)
class Registration(Possession):
    """A hospital joins the chain.

    Attributes:
        hospital_id: SHA-256(domain ‖ compressed public key), in hex: `Signer.hospital_id()`.
        name: Short name, unique in the chain whatever its case.
        kind: Kind of data the hospital holds (its community), such as "lung CT".
        records: Number of records (scans or slices) it holds.
    """

    type: ClassVar[str] = "registration"
    hospital_id: Digest
    name: Name
    public_key: PublicKey
    kind: Name
    records: Count
    possession: Signature = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = hospital_id(self.public_key)
        fits = self.hospital_id == expected
        require(fits, "registration.hospital_id", self.hospital_id, f"this key's is {expected}")

    @classmethod
    def of(cls, signer: Signer, name: str, kind: str, records: int, chain_id: str) -> "Registration":
        """Returns the registration of a key's holder on a chain (`keys.chain_binding`), proven."""
        return cls(signer.hospital_id(), name, signer.public_key, kind, records).proven(signer, chain_id)


@dataclass(frozen=True)
class Rotation(Statement, Possession):
    """A hospital changes its key, keeping its id; from the next record on the old key signs nothing.

    Attributes:
        nonce: 16 bytes in hex, used once.
        signature: Of the old key; the possession is that of the new one.
    """

    type: ClassVar[str] = "rotation"
    hospital: Digest
    public_key: PublicKey
    nonce: Nonce
    signature: Signature = ""
    possession: Signature = ""


@dataclass(frozen=True)
class Revocation(Form):
    """The chain's owner excludes a hospital: from the next record on its key signs nothing; what it signed stays.

    Attributes:
        hospital: Id of the hospital.
        reason: A short reason.
    """

    type: ClassVar[str] = "revocation"
    hospital: Digest
    reason: Name


@dataclass(frozen=True)
class RoundStatement(Statement):
    """A statement about one round of a task."""

    task: Name
    round: Count
    hospital: Digest


@dataclass(frozen=True)
class Commitment(RoundStatement):
    """A hospital binds itself to its update of a round, and a peer confirms to have seen it in time.

    The update itself stays with the hospital: `digest` is SHA-256(salt ‖ update digest), since the bare hash of
    an un-noised update would let anybody confirm a guess of it. The salt goes to the auditor (`commit`).

    Attributes:
        digest: The commitment, in hex.
        nonce: 16 bytes in hex, used once.
        peer: Id of the hospital that countersigned.
        countersignature: r ‖ s of the peer over the statement and its signature, in hex.
    """

    type: ClassVar[str] = "commitment"
    digest: Digest
    nonce: Nonce
    peer: Digest
    signature: Signature = ""
    countersignature: Signature = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.peer != self.hospital, "commitment.peer", self.peer, "another hospital countersigns")

    def countersigned(self, peer: Signer, chain_id: str) -> "Commitment":
        """Returns the commitment with the peer's signature over it."""
        return _with(self, "countersignature", peer.sign("countersignature", chain_id, canonical.encode(self._seen())))

    def is_countersigned(self, public_key: bytes, chain_id: str) -> bool:
        """Tells whether this key countersigned the commitment on this chain."""
        return _verifies(public_key, self.countersignature, "countersignature", chain_id, self._seen())

    def _seen(self) -> dict[str, Any]:
        return self.body() | {"signature": self.signature}


@dataclass(frozen=True)
class Ballot(RoundStatement):
    """What one hospital measured of the others' models on its own records (Kumar et al. 2020, Eq 17).

    Attributes:
        errors: Pairs of candidate id and mean absolute error in [0, 1] as a decimal string, sorted by id; None
            where the model gave no finite error.
        nonce: 16 bytes in hex, used once.
    """

    type: ClassVar[str] = "ballot"
    errors: Errors
    nonce: Nonce
    signature: Signature = ""


@dataclass(frozen=True)
class Decision(RoundStatement):
    """What the leader of a round concludes from its ballots; everybody recomputes it.

    Attributes:
        errors: Pairs of hospital id and MAE(H_j) of Eq 18 as a decimal string, sorted by id; None without a vote.
        weights: Pairs of hospital id and its model's share in the mean, of those that were not out-voted, sorted.
    """

    type: ClassVar[str] = "decision"
    errors: Figures
    weights: Figures
    signature: Signature = ""

    @property
    def accepted(self) -> tuple[str, ...]:
        """Ids of those whose models were not out-voted, sorted."""
        return tuple(member for member, _ in self.weights)


def commit(signer: Signer, chain_id: str, task: str, round: int, update_digest: str) -> tuple[str, str, str]:
    """Returns the commitment to an update, its nonce and the salt that opens it, all in hex.

    Salt and nonce are derived from the hospital's secret (HMAC-SHA256) and the round, so that a round run again
    after a crash commits to the same bytes.
    """
    salt = _derive(signer, "salt", [chain_id, task, round])
    digest = sha256(salt + bytes.fromhex(update_digest)).hexdigest()
    return digest, nonce_of(signer, chain_id, "commitment", task, round), salt.hex()


def nonce_of(signer: Signer, chain_id: str, kind: str, task: str, round: int) -> str:
    """Returns the nonce of a hospital's statement of a kind about a round, derived from its secret, in hex."""
    return _derive(signer, "nonce", [chain_id, kind, task, round])[:16].hex()


def opens(commitment: Commitment, salt: str, update_digest: str) -> bool:
    """Tells whether this salt and update are what a hospital committed to."""
    try:
        found = sha256(bytes.fromhex(salt) + bytes.fromhex(update_digest)).hexdigest()
    except (TypeError, ValueError):
        return False
    return hmac.compare_digest(found, commitment.digest)


def _derive(signer: Signer, label: str, place: list[str | int]) -> bytes:
    return hmac.digest(signer.private_key, b"capsfl.derived.v1\x00" + canonical.encode([label, *place]), "sha256")


def _with(record: Any, field: str, signature: bytes) -> Any:
    return replace(record, **{field: signature.hex()})


def _verifies(public_key: bytes, signature: str, kind: str, chain_id: str, body: dict[str, Any]) -> bool:
    return Verifier(public_key).verify(bytes.fromhex(signature), kind, chain_id, canonical.encode(body))
