"""A chain of blocks in memory: no files and no private state but what the blocks say."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from capsfl.ledger import merkle
from capsfl.ledger.block import Block, SignedHead
from capsfl.ledger.consensus import approvals_needed, has_work
from capsfl.ledger.errors import DamageError, Divergence, LedgerError
from capsfl.ledger.fields import check_signature
from capsfl.ledger.keys import Signer, hospital_id
from capsfl.ledger.records import Genesis, Record, RoundRecord, record_id, record_leaf
from capsfl.ledger.rules import Index, admit

_NO_PREDECESSOR = "0" * 64


class History:
    """A valid chain of blocks: it grows by `extend`, which admits a block only if every rule holds.

    Blocks link, are signed by the key in the genesis record, and hold at least one record, each admitted by
    `rules.admit`. Where the chain's rules ask for a quorum or for work, every block after the first carries the
    approvals of so many members, over the head with the block in it, and a hash with so many zero bits.

    Approvals beyond the quorum may be taken off a copy: they sign the head, so that no head, hash or decision holds
    them, and what the chain says is the same without them. Who counts on his own keeps it (`SignedHead.approve`).
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.hashes: list[bytes] = []
        self._roots: list[bytes] = []
        self._frontier = merkle.Frontier()
        self.index = Index()

    @property
    def genesis(self) -> Genesis:
        """The first record; the history must not be empty."""
        return self.index.genesis["genesis"]

    @property
    def rounds(self) -> Mapping[tuple[str, int], RoundRecord]:
        """The round records by task and number, in the order of the chain."""
        return self.index.rounds

    def holding(self, record: Record) -> Block | None:
        """Returns the block that holds exactly this record, or None."""
        height = self.index.heights.get(record_id(record))
        return None if height is None else self.blocks[height]

    def head(self, size: int | None = None) -> SignedHead:
        """Returns the signed head of the first `size` blocks (all by default)."""
        size = len(self.blocks) if size is None else size
        assert 0 < size <= len(self.blocks)
        genesis = self.genesis
        signature = self.blocks[size - 1].signature
        return SignedHead(genesis.chain_id, genesis.public_key, size, self._roots[size - 1], signature)

    def next_block(self, records: Sequence[Record], signer: Signer, members: Iterable[Signer] = ()) -> Block:
        """Returns the signed block that would extend this history by `records`, without admitting it.

        Args:
            records: What the block records.
            signer: The owner's key.
            members: Keys of the hospitals that approve the block; those of others do not count.

        Raises:
            LedgerError: a rule does not allow one of the records here, or the key is not the owner's.
        """
        index = admit(records, self.index, len(self.blocks))
        header = self._expected_header(records, index)
        if signer.hospital_id() != header["signer"]:
            raise LedgerError(f"the key of {signer.hospital_id()} does not own this chain: {header['signer']} does")
        block = Block(**header, records=tuple(records), signature=b"")
        if self.blocks and index.rules.proof_of_work:
            block = _mine(block, index.rules.proof_of_work)
        frontier = self._frontier.grown(block.hash())
        head = SignedHead.sign(signer, header["chain_id"], frontier.size, frontier.root())
        known = {self.index.keys[member]: member for member in self.index.members()}
        approvals = sorted((known[m.public_key], head.approve(m).hex()) for m in members if m.public_key in known)
        return replace(block, signature=head.signature, approvals=tuple(approvals))

    def extend(self, block: Block) -> None:
        """Admits a block as the next one.

        Raises:
            DamageError: a rule forbids it; the history stays as it was.
        """
        height = len(self.blocks)
        try:
            self._admit(block)
        except LedgerError as error:
            raise DamageError(f"block {height}: {error}", height=height) from None

    def _admit(self, block: Block) -> None:
        additions = admit(block.records, self.index, len(self.blocks))
        for name, expected in self._expected_header(block.records, additions).items():
            found = getattr(block, name)
            if found != expected:
                raise LedgerError(f"{name} is {str(found)[:80]!r}, not {expected!r}")
        frontier = self._frontier.grown(block.hash())
        public_key, root = additions.genesis["genesis"].public_key, frontier.root()
        head = SignedHead(block.chain_id, public_key, frontier.size, root, block.signature)
        if not head.is_signed():
            raise LedgerError("the signature is not the owner's over this block and all before it")
        self._check_approvals(block, head)
        bits = self.index.rules.proof_of_work if self.blocks else 0
        if (block.work is not None) != (bits > 0) or not has_work(block.hash(), bits):
            raise LedgerError(f"work: the hash does not have the {bits} zero bits of this chain's rules")
        self.blocks.append(block)
        self.hashes.append(block.hash())
        self._roots.append(root)
        self._frontier = frontier
        self.index.absorb(additions)

    def _check_approvals(self, block: Block, head: SignedHead) -> None:
        # Judged by who belonged to the chain before the block: nobody joins to approve his own joining.
        approvers = [member for member, _ in block.approvals]
        if not approvers and self.index.rules.quorum == "owner":
            return
        members = self.index.members()
        if len(approvers) > len(members) or approvers != sorted(set(approvers)):
            raise LedgerError("approvals: more than the members, out of order, or one member twice")
        for member, signature in block.approvals:
            if member not in members:
                raise LedgerError(f"approvals: {member[:8]!r} is not a member of the chain")
            check_signature("approvals", signature)
            if not head.is_approved(self.index.keys[member], bytes.fromhex(signature)):
                raise LedgerError(f"approvals: the signature of {member[:8]} is not over this block")
        needed = approvals_needed(self.index.rules, len(members)) if self.blocks else 0
        if len(approvers) < needed:
            raise LedgerError(f"approvals: {len(approvers)} of {len(members)} members, the rules ask for {needed}")

    def _expected_header(self, records: Sequence[Record], index: Index) -> dict[str, Any]:
        genesis = index.genesis["genesis"]
        return {
            "chain_id": genesis.chain_id,
            "height": len(self.blocks),
            "previous": self.hashes[-1].hex() if self.blocks else _NO_PREDECESSOR,
            "records_root": merkle.root([record_leaf(record) for record in records]).hex(),
            "signer": hospital_id(genesis.public_key),
        }


def compare_rounds(recorded: RoundRecord, rerun: RoundRecord) -> None:
    """Checks that a round run again gave what is recorded of it.

    Raises:
        Divergence: it did not; the error names the round and the first tensor, or else field, that differs.
    """
    if recorded == rerun:
        return
    leaf = first_difference(dict(recorded.leaves), dict(rerun.leaves))
    if leaf is not None:
        what = f"tensor {leaf} is not the recorded one"
    else:
        name = next(item.name for item in fields(recorded) if getattr(recorded, item.name) != getattr(rerun, item.name))
        what = f"{name} is {str(getattr(rerun, name))[:80]}, recorded is {str(getattr(recorded, name))[:80]}"
    where = f"task {recorded.task}, round {recorded.round}"
    raise Divergence(f"{where}: {what}: the run is not the one this ledger records")


def first_difference(recorded: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Returns the first path, in sorted order, that one side lacks or has with another digest."""
    paths = sorted({*recorded, *found})
    return next((path for path in paths if recorded.get(path, "") != found.get(path, "")), None)


def _mine(block: Block, bits: int) -> Block:
    work = 0
    while not has_work((found := replace(block, work=work)).hash(), bits):
        work += 1
    return found
