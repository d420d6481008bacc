"""What hospitals sign for themselves: commitments to updates, ballots, and changes of their keys.

A statement binds the chain, its own type, the hospital and a nonce, and where it speaks of a round, task and
round as well; a signature copied to another round, chain or type verifies nowhere. The identity of a statement
excludes its signatures.
"""

import hmac
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, ClassVar, Self, cast

from capsfl.ledger import canonical
from capsfl.ledger.fields import check_count, check_digest, check_name, check_public_key, require
from capsfl.ledger.keys import Signer, Verifier

_SIGNATURE = re.compile(r"([0-9a-f]{128})?")
_NONCE = re.compile(r"[0-9a-f]{32}")


class Statement(ABC):
    """A record that a hospital signs; `signed` fills the signature in, `is_signed` checks it."""

    type: ClassVar[str]
    hospital: str
    signature: str

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """Returns what the signature covers: the canonical object without signatures."""

    def to_canonical(self) -> dict[str, Any]:
        """Returns the record as a canonical object."""
        return self.body() | {"signature": self.signature}

    def signed(self, signer: Signer, chain_id: str) -> Self:
        """Returns the statement with the signer's signature on this chain."""
        signature = signer.sign(self.type, chain_id, canonical.encode(self.body())).hex()
        return replace(self, signature=signature)  # pyright: ignore[reportArgumentType]

    def is_signed(self, public_key: bytes, chain_id: str) -> bool:
        """Tells whether this key signed the statement on this chain."""
        return _verifies(public_key, self.signature, self.type, chain_id, self.body())


@dataclass(frozen=True)
class Commitment(Statement):
    """A hospital binds itself to its update of a round, and a peer confirms to have seen it in time.

    The update itself stays with the hospital: `digest` is SHA-256(salt ‖ update digest), since the bare hash of
    an un-noised update would let anybody confirm a guess of it. The salt goes to the auditor (`commit`).

    Attributes:
        task: Name of the task.
        round: Number of the round.
        hospital: Id of the hospital.
        digest: The commitment, in hex.
        nonce: 16 bytes in hex, used once.
        peer: Id of the hospital that countersigned.
        signature: r ‖ s of the hospital, in hex.
        countersignature: r ‖ s of the peer over the statement and its signature, in hex.
    """

    type: ClassVar[str] = "commitment"
    task: str
    round: int
    hospital: str
    digest: str
    nonce: str
    peer: str
    signature: str = ""
    countersignature: str = ""

    def __post_init__(self) -> None:
        _check_round(self.type, self.task, self.round)
        for field in ("hospital", "digest", "peer"):
            check_digest(f"commitment.{field}", getattr(self, field))
        require(self.peer != self.hospital, "commitment.peer", self.peer, "another hospital countersigns")
        check_nonce("commitment.nonce", self.nonce)
        for field in ("signature", "countersignature"):
            check_signature(f"commitment.{field}", getattr(self, field))

    def body(self) -> dict[str, Any]:
        """Returns what the hospital's signature covers."""
        return {
            "type": self.type,
            "task": self.task,
            "round": self.round,
            "hospital": self.hospital,
            "digest": self.digest,
            "nonce": self.nonce,
            "peer": self.peer,
        }

    def to_canonical(self) -> dict[str, Any]:
        """Returns the record as a canonical object."""
        return super().to_canonical() | {"countersignature": self.countersignature}

    def countersigned(self, peer: Signer, chain_id: str) -> "Commitment":
        """Returns the commitment with the peer's signature over it."""
        body = canonical.encode(super().to_canonical())
        return replace(self, countersignature=peer.sign("countersignature", chain_id, body).hex())

    def is_countersigned(self, public_key: bytes, chain_id: str) -> bool:
        """Tells whether this key countersigned the commitment on this chain."""
        return _verifies(public_key, self.countersignature, "countersignature", chain_id, super().to_canonical())


@dataclass(frozen=True)
class Ballot(Statement):
    """What one hospital measured of the others' models on its own records (Kumar et al. 2020, Eq 17).

    Attributes:
        task: Name of the task.
        round: Number of the round.
        hospital: Id of the voter.
        errors: Pairs of candidate id and mean absolute error in [0, 1] as a decimal string, sorted by id; None
            where the model gave no finite error.
        nonce: 16 bytes in hex, used once.
        signature: r ‖ s of the voter, in hex.
    """

    type: ClassVar[str] = "ballot"
    task: str
    round: int
    hospital: str
    errors: tuple[tuple[str, str | None], ...]
    nonce: str
    signature: str = ""

    def __post_init__(self) -> None:
        _check_round(self.type, self.task, self.round)
        check_digest("ballot.hospital", self.hospital)
        check_errors("ballot.errors", self.errors)
        check_nonce("ballot.nonce", self.nonce)
        check_signature("ballot.signature", self.signature)

    def body(self) -> dict[str, Any]:
        """Returns what the voter's signature covers."""
        return {
            "type": self.type,
            "task": self.task,
            "round": self.round,
            "hospital": self.hospital,
            "errors": [list(pair) for pair in self.errors],
            "nonce": self.nonce,
        }


@dataclass(frozen=True)
class Rotation(Statement):
    """A hospital changes its key, keeping its id; from the next record on the old key signs nothing.

    Attributes:
        hospital: Id of the hospital.
        public_key: The new compressed point, 33 bytes.
        nonce: 16 bytes in hex, used once.
        signature: r ‖ s of the old key, in hex.
        possession: r ‖ s of the new key over the same body, in hex: nobody takes over another's key.
    """

    type: ClassVar[str] = "rotation"
    hospital: str
    public_key: bytes
    nonce: str
    signature: str = ""
    possession: str = ""

    def __post_init__(self) -> None:
        check_digest("rotation.hospital", self.hospital)
        check_public_key("rotation.public_key", self.public_key)
        check_nonce("rotation.nonce", self.nonce)
        for field in ("signature", "possession"):
            check_signature(f"rotation.{field}", getattr(self, field))

    def body(self) -> dict[str, Any]:
        """Returns what both signatures cover."""
        return {
            "type": self.type,
            "hospital": self.hospital,
            "public_key": self.public_key.hex(),
            "nonce": self.nonce,
        }

    def to_canonical(self) -> dict[str, Any]:
        """Returns the record as a canonical object."""
        return super().to_canonical() | {"possession": self.possession}

    def proven(self, new_key: Signer, chain_id: str) -> "Rotation":
        """Returns the rotation with the new key's signature."""
        return replace(self, possession=new_key.sign("possession", chain_id, canonical.encode(self.body())).hex())

    def is_proven(self, chain_id: str) -> bool:
        """Tells whether the new key signed the rotation on this chain."""
        return _verifies(self.public_key, self.possession, "possession", chain_id, self.body())


@dataclass(frozen=True)
class Revocation:
    """The chain's owner excludes a hospital: from the next record on its key signs nothing; what it signed stays.

    Attributes:
        hospital: Id of the hospital.
        reason: A short reason.
    """

    type: ClassVar[str] = "revocation"
    hospital: str
    reason: str

    def __post_init__(self) -> None:
        check_digest("revocation.hospital", self.hospital)
        check_name("revocation.reason", self.reason)

    def to_canonical(self) -> dict[str, Any]:
        """Returns the record as a canonical object."""
        return {"type": self.type, "hospital": self.hospital, "reason": self.reason}


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


def check_signature(field: str, signature: object) -> None:
    """Requires 128 lower-case hex digits, or nothing yet."""
    fits = isinstance(signature, str) and _SIGNATURE.fullmatch(signature) is not None
    require(fits, field, signature, "use 128 lower-case hex digits")


def check_nonce(field: str, nonce: object) -> None:
    """Requires 32 lower-case hex digits."""
    require(
        isinstance(nonce, str) and _NONCE.fullmatch(nonce) is not None, field, nonce, "use 32 lower-case hex digits"
    )


def check_errors(field: str, errors: object) -> None:
    """Requires a tuple of (hospital id, decimal in [0, 1] or None), sorted by id, each id once."""
    require(type(errors) is tuple, field, errors, "give a tuple of (hospital id, error)")
    previous = ""
    for pair in cast(tuple[object, ...], errors):
        require(type(pair) is tuple and len(pair) == 2, field, pair, "give pairs of (hospital id, error)")
        member, error = cast(tuple[str, str | None], pair)
        check_digest(field, member)
        in_range = error is None or (canonical.is_decimal(error) and 0 <= float(error) <= 1)
        require(in_range, f"{field}[{member[:8]}]", error, "use a decimal string from 0 to 1, or None")
        require(previous < member, field, member, "sort the ids and name each once")
        previous = member


def _derive(signer: Signer, label: str, place: list[str | int]) -> bytes:
    return hmac.digest(signer.private_key, b"capsfl.derived.v1\x00" + canonical.encode([label, *place]), "sha256")


def _check_round(kind: str, task: object, number: object) -> None:
    check_name(f"{kind}.task", task)
    check_count(f"{kind}.round", number)


def _verifies(public_key: bytes, signature: str, kind: str, chain_id: str, body: dict[str, Any]) -> bool:
    return Verifier(public_key).verify(bytes.fromhex(signature), kind, chain_id, canonical.encode(body))
