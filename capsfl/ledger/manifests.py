"""What a checkpoint holds, and what its files were when it was written: signed beside the chain, and no part of it.

Checkpoint files are not reproducible, tensors are. A round that is run again after a crash must come to what the chain
records of it, so the chain holds digests of the model's tensors only. The manifest lies beside it under the same key:
of all that the checkpoint holds, an optimizer's state too, signed before any of it is written, and of its files, which
are there afterwards only. So a crash between the two leaves nothing that nobody signed. A difference in files alone
says that somebody wrote the same again, and nothing about the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from capsfl.ledger import canonical
from capsfl.ledger.errors import LedgerError, RecordError
from capsfl.ledger.fields import Digest, Digests, Signature, check_digest, optional
from capsfl.ledger.keys import Signer
from capsfl.ledger.records import RoundRecord, from_canonical
from capsfl.ledger.statements import RoundStatement


@dataclass(frozen=True)
class Manifest(RoundStatement):
    """The owner's word on one round's checkpoint.

    Attributes:
        parameters_digest: Of the round's record.
        files: Pairs of relative path and SHA-256 in hex, sorted by path; none before they are written.
        contents: Digest of all that the checkpoint holds, in hex; None in manifests from before there was one.
    """

    type: ClassVar[str] = "manifest"
    parameters_digest: Digest
    files: Digests
    contents: Annotated[str | None, optional(check_digest)] = None
    signature: Signature = ""

    @classmethod
    def of(
        cls, record: RoundRecord, contents: str, files: Mapping[str, str], owner: Signer, chain_id: str
    ) -> "Manifest":
        """Returns the signed manifest of a round's checkpoint, on the chain of this binding."""
        rows = tuple(sorted(files.items()))
        bare = cls(record.task, record.round, owner.hospital_id(), record.parameters_digest, rows, contents)
        return bare.signed(owner, chain_id)

    def encode(self) -> bytes:
        """Returns the canonical bytes, signature included."""
        return canonical.encode(self.to_canonical())

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        """Returns the manifest in `data`; says nothing about its signature (see `check`).

        Raises:
            LedgerError: `data` is none.
        """
        return from_canonical(canonical.decode(data), {cls.type: cls})

    def check(self, record: RoundRecord, public_key: bytes, chain_id: str) -> None:
        """Checks that this is the owner's manifest of a recorded round.

        Raises:
            LedgerError: it is another round's or model's, or not signed by the owner's key on this chain.
        """
        if (self.task, self.round, self.parameters_digest) != (record.task, record.round, record.parameters_digest):
            raise RecordError("the manifest is that of another round or model")
        if not self.is_signed(public_key, chain_id):
            raise LedgerError("the manifest is not signed by the owner of this chain")
