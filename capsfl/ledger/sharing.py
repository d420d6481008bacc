"""Who may have a model: signed policies of its owner, requests, and grants (the paper's data sharing, Figure 4).

policy -> request -> grant (checked against the policy at that height) -> sealed model to the requester's key
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from capsfl.ledger.fields import check_count, check_digest, check_name, require
from capsfl.ledger.statements import Statement, check_nonce, check_signature


@dataclass(frozen=True)
class AccessPolicy(Statement):
    """Whom a hospital lets retrieve what it holds of one category; the latest version counts.

    Attributes:
        hospital: Id of the owner.
        category: Kind of model or data, such as "lung CT".
        version: 0, then one more with every change.
        allowed: Ids that may retrieve, sorted; empty for nobody.
        expires: Height of the chain from which the policy allows nothing, or None.
        signature: r ‖ s of the owner, in hex.
    """

    type: ClassVar[str] = "policy"
    hospital: str
    category: str
    version: int
    allowed: tuple[str, ...]
    expires: int | None = None
    signature: str = ""

    def __post_init__(self) -> None:
        check_digest("policy.hospital", self.hospital)
        check_name("policy.category", self.category)
        check_count("policy.version", self.version)
        require(type(self.allowed) is tuple, "policy.allowed", self.allowed, "give a tuple of hospital ids")
        for member in self.allowed:
            check_digest("policy.allowed", member)
        in_order = list(self.allowed) == sorted(set(self.allowed))
        require(in_order, "policy.allowed", self.allowed, "sort the ids and name each once")
        if self.expires is not None:
            check_count("policy.expires", self.expires)
        check_signature("policy.signature", self.signature)

    def body(self) -> dict[str, Any]:
        """Returns what the owner's signature covers."""
        return {
            "type": self.type,
            "hospital": self.hospital,
            "category": self.category,
            "version": self.version,
            "allowed": list(self.allowed),
            "expires": self.expires,
        }

    def allows(self, requester: str, height: int) -> bool:
        """Tells whether a requester may be granted access in the block at a height."""
        return requester in self.allowed and (self.expires is None or height < self.expires)


@dataclass(frozen=True)
class RetrievalRequest(Statement):
    """A hospital asks another for a model.

    Attributes:
        hospital: Id of the requester.
        owner: Id of the hospital asked.
        category: Kind of model or data.
        model: Parameters digest of the model asked for, in hex.
        nonce: 16 bytes in hex, used once.
        signature: r ‖ s of the requester, in hex.
    """

    type: ClassVar[str] = "request"
    hospital: str
    owner: str
    category: str
    model: str
    nonce: str
    signature: str = ""

    def __post_init__(self) -> None:
        for field in ("hospital", "owner", "model"):
            check_digest(f"request.{field}", getattr(self, field))
        check_name("request.category", self.category)
        check_nonce("request.nonce", self.nonce)
        check_signature("request.signature", self.signature)

    def body(self) -> dict[str, Any]:
        """Returns what the requester's signature covers."""
        return {
            "type": self.type,
            "hospital": self.hospital,
            "owner": self.owner,
            "category": self.category,
            "model": self.model,
            "nonce": self.nonce,
        }


@dataclass(frozen=True)
class RetrievalGrant(Statement):
    """The owner grants a request and says which sealed bytes answer it.

    Attributes:
        hospital: Id of the owner.
        request: Record id of the request, in hex.
        policy_version: Version of the policy that allows it.
        sealed: SHA-256 of the sealed model, in hex.
        signature: r ‖ s of the owner, in hex.
    """

    type: ClassVar[str] = "grant"
    hospital: str
    request: str
    policy_version: int
    sealed: str
    signature: str = ""

    def __post_init__(self) -> None:
        for field in ("hospital", "request", "sealed"):
            check_digest(f"grant.{field}", getattr(self, field))
        check_count("grant.policy_version", self.policy_version)
        check_signature("grant.signature", self.signature)

    def body(self) -> dict[str, Any]:
        """Returns what the owner's signature covers."""
        return {
            "type": self.type,
            "hospital": self.hospital,
            "request": self.request,
            "policy_version": self.policy_version,
            "sealed": self.sealed,
        }
