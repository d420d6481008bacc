"""A proof one can hand on: a record, its place under a signed head, and nothing else of the ledger.

    record -> records root of its block -> block header -> Merkle root of the head -> the owner's signature

It is the owner's word alone: the approvals of members, and that the block follows the chain's rules, show only in the
whole ledger. The two paths are RFC 6962 audit paths, 32 bytes a level: at 1,000 blocks the upper one has at most ten.
"""

from dataclasses import dataclass

from capsfl.ledger import canonical, merkle
from capsfl.ledger.block import SignedHead, check_version
from capsfl.ledger.errors import LedgerError
from capsfl.ledger.history import History
from capsfl.ledger.keys import hospital_id
from capsfl.ledger.records import Record, from_canonical, record_leaf


@dataclass(frozen=True)
class Proof:
    """What a checked proof shows.

    Attributes:
        record: The record.
        height: Of the block that holds it.
        head: The signed head it is under; whether its key is the right one is for the reader to know.
    """

    record: Record
    height: int
    head: SignedHead


def prove(history: History, record: Record) -> bytes:
    """Returns the canonical bytes of a proof that the history holds a record.

    Raises:
        LedgerError: it does not hold it.
    """
    block = history.holding(record)
    if block is None:
        raise LedgerError(f"{record.type}: no such record in this ledger")
    leaves = [record_leaf(other) for other in block.records]
    position = leaves.index(record_leaf(record))
    return canonical.encode(
        {
            "type": "proof.v1",
            "record": record.to_canonical(),
            "position": position,
            "records": len(leaves),
            "record_path": [node.hex() for node in merkle.inclusion_proof(leaves, position)],
            "header": block.header(),
            "block_path": [node.hex() for node in merkle.inclusion_proof(history.hashes, block.height)],
            "head": canonical.decode(history.head().encode()),
        }
    )


def check_proof(data: bytes) -> Proof:
    """Returns what a proof shows, checked from the record up to the signature.

    Raises:
        LedgerError: it shows nothing; says which step fails.
    """
    value = canonical.decode(data)
    try:
        if value["type"] != "proof.v1":
            raise ValueError
        record, header = from_canonical(value["record"]), value["header"]
        head = SignedHead.decode(canonical.encode(value["head"]))
        record_path, block_path = (
            [bytes.fromhex(node) for node in value[name]] for name in ("record_path", "block_path")
        )
        position, records, height = value["position"], value["records"], header["height"]
        check_version(header["type"])
        if header["signer"] != hospital_id(head.public_key):
            raise ValueError
        records_root, chain_id = bytes.fromhex(header["records_root"]), header["chain_id"]
        if not all(type(number) is int for number in (position, records, height)):
            raise ValueError
    except LedgerError:
        raise
    except (TypeError, KeyError, ValueError):
        raise LedgerError("not a proof: give a file that `capsfl ledger prove` wrote") from None
    if not merkle.verify_inclusion(record_leaf(record), position, records, record_path, records_root):
        raise LedgerError("the record is not under its block's records root")
    block_leaf = merkle.leaf_hash(canonical.encode(header))
    if not merkle.verify_inclusion(block_leaf, height, head.size, block_path, head.root):
        raise LedgerError("the block is not under the head's Merkle root")
    if chain_id != head.chain_id or not head.is_signed():
        raise LedgerError("the head is not signed by the key it names, or names another chain than the block")
    return Proof(record, height, head)
