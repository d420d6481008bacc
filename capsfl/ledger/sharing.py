"""Who may have a model: signed policies of its owner, requests, and grants (the paper's data sharing, Figure 4).

policy -> request -> grant (checked against the policy at that height) -> sealed model to the requester's key
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from capsfl.ledger.fields import Count, Digest, Ids, Name, Nonce, Signature, check_count, optional
from capsfl.ledger.statements import Statement


@dataclass(frozen=True)
class AccessPolicy(Statement):
    """Whom a hospital lets retrieve what it holds of one category; the latest version counts.

    Attributes:
        hospital: Id of the owner.
        category: Kind of model or data, such as "lung CT".
        version: 0, then one more with every change.
        allowed: Ids that may retrieve, sorted; empty for nobody.
        expires: Height of the chain from which the policy allows nothing, or None.
    """

    type: ClassVar[str] = "policy"
    hospital: Digest
    category: Name
    version: Count
    allowed: Ids
    expires: Annotated[int | None, optional(check_count)] = None
    signature: Signature = ""

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
    """

    type: ClassVar[str] = "request"
    hospital: Digest
    owner: Digest
    category: Name
    model: Digest
    nonce: Nonce
    signature: Signature = ""


@dataclass(frozen=True)
class RetrievalGrant(Statement):
    """The owner grants a request and says which sealed bytes answer it.

    Attributes:
        hospital: Id of the owner.
        request: Record id of the request, in hex.
        policy_version: Version of the policy that allows it.
        sealed: SHA-256 of the sealed model, in hex.
    """

    type: ClassVar[str] = "grant"
    hospital: Digest
    request: Digest
    policy_version: Count
    sealed: Digest
    signature: Signature = ""
