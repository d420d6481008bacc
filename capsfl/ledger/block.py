"""The two signed values of a chain, its blocks and its head, and their bytes.

A block's header names its chain, height, predecessor and signer and the Merkle root of its records. Headers
are in turn the leaves of the chain's Merkle tree, and the signature of a block is over the head of that tree
(size and root) with the block in it. One signature so vouches for the block and for everything before it,
and each is a portable statement about the whole chain: two of one size with different roots prove that the
signer told two stories.
"""

import re
from dataclasses import dataclass
from typing import Any

from capsfl.ledger import canonical, merkle
from capsfl.ledger.errors import LedgerError, VersionError
from capsfl.ledger.keys import Signer, Verifier
from capsfl.ledger.records import Record, from_canonical

BLOCK_TYPE = "block.v2"
_WITNESS_TYPE = "cosignature"
_BLOCK_VERSION = re.compile(r"block\.v([0-9]{1,9})")


@dataclass(frozen=True)
class SignedHead:
    """A signed statement of a chain's whole content: what a witness keeps.

    Attributes:
        chain_id: Name of the chain.
        public_key: Compressed key of its owner, 33 bytes.
        size: Number of blocks.
        root: Merkle root over the block headers, 32 bytes.
        signature: r ‖ s over the other four, 64 bytes.
    """

    chain_id: str
    public_key: bytes
    size: int
    root: bytes
    signature: bytes

    def encode(self) -> bytes:
        """Returns the canonical bytes of the head and its signature."""
        return canonical.encode(self._body() | {"signature": self.signature.hex()})

    @classmethod
    def decode(cls, data: bytes) -> "SignedHead":
        """Returns the head in `data`; says nothing about its signature (see `is_signed`).

        Raises:
            LedgerError: `data` is not a head.
        """
        value = canonical.decode(data)
        try:
            head = cls(
                chain_id=value["chain_id"],
                public_key=bytes.fromhex(value["public_key"]),
                size=value["size"],
                root=bytes.fromhex(value["root"]),
                signature=bytes.fromhex(value["signature"]),
            )
            # Whatever the fields above did not read, or read too kindly, shows when they are written again.
            whole = head.encode() == data and type(head.size) is int
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise LedgerError("not the head of a ledger")
        return head

    def is_signed(self) -> bool:
        """Tells whether the head's own key signed it."""
        return Verifier(self.public_key).verify(self.signature, "head", self.chain_id, canonical.encode(self._body()))

    def approve(self, member: Signer) -> bytes:
        """Returns a member's r ‖ s over this head, 64 bytes: its vote for the block that ends there."""
        return member.sign("approval", self.chain_id, canonical.encode(self._body()))

    def is_approved(self, public_key: bytes, signature: bytes) -> bool:
        """Tells whether this key approved the head as a member."""
        return Verifier(public_key).verify(signature, "approval", self.chain_id, canonical.encode(self._body()))

    def cosign(self, witness: Signer) -> bytes:
        """Returns a witness's r ‖ s over this head, 64 bytes: it saw the head and keeps it outside.

        Of another type than an approval, which lies in the log: whoever copies one from there makes no witness of it.
        """
        return witness.sign(_WITNESS_TYPE, self.chain_id, canonical.encode(self._body()))

    def is_cosigned(self, public_key: bytes, signature: bytes) -> bool:
        """Tells whether this key cosigned the head as a witness."""
        return Verifier(public_key).verify(signature, _WITNESS_TYPE, self.chain_id, canonical.encode(self._body()))

    def contradicts(self, other: "SignedHead") -> bool:
        """Tells whether the two prove equivocation: one key signed two roots for one size of one chain."""
        same = (self.chain_id, self.public_key, self.size) == (other.chain_id, other.public_key, other.size)
        return same and self.root != other.root and self.is_signed() and other.is_signed()

    def _body(self) -> dict[str, Any]:
        return {
            "chain_id": self.chain_id,
            "public_key": self.public_key.hex(),
            "size": self.size,
            "root": self.root.hex(),
        }

    @classmethod
    def sign(cls, signer: Signer, chain_id: str, size: int, root: bytes) -> "SignedHead":
        """Returns the head of these figures, signed."""
        unsigned = cls(chain_id, signer.public_key, size, root, b"")
        signature = signer.sign("head", chain_id, canonical.encode(unsigned._body()))
        return cls(chain_id, signer.public_key, size, root, signature)


@dataclass(frozen=True)
class Block:
    """One link of the chain.

    Attributes:
        chain_id: Name of the chain.
        height: Position in the chain, from 0.
        previous: Hash of the block before, in hex; zeros at height 0.
        records_root: Merkle root over the canonical bytes of the records, in hex.
        signer: Hospital id of the chain's owner.
        records: What the block records, at least one.
        signature: r ‖ s over the chain's head with this block in it, 64 bytes.
        work: Number that gives the header's hash the zero bits the chain's rules ask for; None where they ask none.
        approvals: Pairs of member id and r ‖ s in hex over the same head, sorted by id: the members' votes for the
            block.
    """

    chain_id: str
    height: int
    previous: str
    records_root: str
    signer: str
    records: tuple[Record, ...]
    signature: bytes
    work: int | None = None
    approvals: tuple[tuple[str, str], ...] = ()

    def header(self) -> dict[str, Any]:
        """Returns what the block's hash covers: everything but the signatures (the records by their root)."""
        header = {
            "type": BLOCK_TYPE,
            "chain_id": self.chain_id,
            "height": self.height,
            "previous": self.previous,
            "records_root": self.records_root,
            "signer": self.signer,
        }
        return header if self.work is None else header | {"work": self.work}

    def hash(self) -> bytes:
        """Returns the RFC 6962 leaf hash of the header: identity of the block, leaf of the chain's tree."""
        return merkle.leaf_hash(canonical.encode(self.header()))

    def encode(self) -> bytes:
        """Returns the canonical bytes of the whole block."""
        value = {
            "header": self.header(),
            "records": [record.to_canonical() for record in self.records],
            "signature": self.signature.hex(),
        }
        if self.approvals:
            value["approvals"] = [list(pair) for pair in self.approvals]
        return canonical.encode(value)

    @classmethod
    def decode(cls, data: bytes) -> "Block":
        """Returns the block in `data`; says nothing about its place in a chain (see `History.extend`).

        Raises:
            LedgerError: `data` is not a block, or a record in it is not one.
        """
        value = canonical.decode(data)
        try:
            header = value["header"]
            check_version(header["type"])
            block = cls(
                chain_id=header["chain_id"],
                height=header["height"],
                previous=header["previous"],
                records_root=header["records_root"],
                signer=header["signer"],
                records=tuple(from_canonical(record) for record in value["records"]),
                signature=bytes.fromhex(value["signature"]),
                work=header.get("work"),
                approvals=tuple((str(member), str(signature)) for member, signature in value.get("approvals", ())),
            )
            whole = block.encode() == data and type(block.height) is int and type(block.work) in (int, type(None))
        except LedgerError:
            raise
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise LedgerError("not a block")
        return block


def check_version(kind: object) -> None:
    """Refuses a block of another version than ours.

    Raises:
        VersionError: says whether the version is an older or a newer one.
    """
    found = _BLOCK_VERSION.fullmatch(kind) if isinstance(kind, str) else None
    if found and kind != BLOCK_TYPE:
        age = "a newer" if int(found[1]) > int(BLOCK_TYPE[7:]) else "an older"
        raise VersionError(
            f"written by {age} version of capsfl ({kind}, this one reads {BLOCK_TYPE}): install that one"
        )
