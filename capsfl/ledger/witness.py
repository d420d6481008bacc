"""What a witness keeps outside a ledger: a head that it signed too, and proof of an owner who told two stories.

A rolled back or rewritten ledger looks whole from inside. It shows against a head that somebody else kept, and two
heads of one size with different roots, both signed by the owner, prove to anybody that the owner signed both.
"""

from typing import Any

from capsfl.ledger import canonical
from capsfl.ledger.block import SignedHead
from capsfl.ledger.errors import LedgerError
from capsfl.ledger.history import History
from capsfl.ledger.keys import Signer

_COSIGNATURE = "cosignature.v2"  # v1 signed what members sign under blocks


def cosign(head: SignedHead, witness: Signer) -> bytes:
    """Returns the canonical bytes of a head with a witness's signature."""
    return canonical.encode(
        {
            "type": _COSIGNATURE,
            "head": canonical.decode(head.encode()),
            "public_key": witness.public_key.hex(),
            "signature": head.cosign(witness).hex(),
        }
    )


def read_cosignature(data: bytes) -> tuple[SignedHead, bytes]:
    """Returns the head in a cosignature and the witness's public key, both signatures checked.

    Raises:
        LedgerError: `data` is none, or a signature does not hold.
    """
    value = _object(data, _COSIGNATURE, {"head", "public_key", "signature"})
    head, (public_key, signature) = _head(value["head"]), _bytes(value["public_key"], value["signature"])
    if not head.is_cosigned(public_key, signature):
        raise LedgerError("the cosignature is not that of the witness it names")
    return head, public_key


def read_head(data: bytes) -> SignedHead:
    """Returns a signed head from a file of a head or of a cosignature, its signatures checked.

    Raises:
        LedgerError: `data` is neither, or a signature does not hold.
    """
    value = canonical.decode(data)
    return read_cosignature(data)[0] if isinstance(value, dict) and "head" in value else _head(value)


def extends(history: History, seen: SignedHead) -> str | None:
    """Tells in a line why a ledger does not extend a head that a witness saw; None where it does."""
    if not history.blocks:
        return f"the witness saw {seen.size} blocks, none can be read"
    genesis, size = history.genesis, len(history.blocks)
    if (seen.chain_id, seen.public_key) != (genesis.chain_id, genesis.public_key):
        return f"the witness saw chain {seen.chain_id} under another key or name: not this ledger"
    if not 0 < seen.size <= size:
        return f"the witness saw {seen.size} blocks, this ledger has {size}: it was rolled back"
    if history.head(seen.size).root != seen.root:
        return f"the owner signed two different histories of {seen.size} blocks (equivocation)"
    return None


def evidence(first: SignedHead, second: SignedHead) -> bytes:
    """Returns the canonical bytes of two heads that contradict each other.

    Raises:
        LedgerError: they do not.
    """
    if not first.contradicts(second):
        raise LedgerError("the heads do not contradict each other: one size, two roots and both signatures are needed")
    return canonical.encode(
        {"type": "equivocation.v1", "heads": [canonical.decode(h.encode()) for h in (first, second)]}
    )


def check_evidence(data: bytes) -> tuple[SignedHead, SignedHead]:
    """Returns the two heads of a proof of equivocation.

    Raises:
        LedgerError: it proves nothing.
    """
    value = _object(data, "equivocation.v1", {"heads"})
    if not isinstance(value["heads"], list) or len(value["heads"]) != 2:
        raise LedgerError("evidence holds two heads")
    first, second = (_head(head) for head in value["heads"])
    if not first.contradicts(second):
        raise LedgerError("the heads do not contradict each other")
    return first, second


def _head(value: Any) -> SignedHead:
    head = SignedHead.decode(canonical.encode(value))
    if not head.is_signed():
        raise LedgerError("the head is not signed by the key it names")
    return head


def _object(data: bytes, kind: str, fields: set[str]) -> dict[str, Any]:
    value = canonical.decode(data)
    if not isinstance(value, dict) or value.get("type") != kind or value.keys() != {"type"} | fields:
        name = kind.partition(".")[0]
        raise LedgerError(f"not a {name}: give a file that this version's `capsfl ledger witness` wrote")
    return value


def _bytes(*texts: object) -> tuple[bytes, ...]:
    try:
        return tuple(bytes.fromhex(text) for text in texts)  # pyright: ignore[reportArgumentType] refused below
    except (TypeError, ValueError):
        raise LedgerError("keys and signatures are hex digits") from None
