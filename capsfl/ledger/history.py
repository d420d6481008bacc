"""The rules of a chain, over blocks in memory: no files and no private state but what the blocks say."""

from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from capsfl.ledger import canonical, merkle
from capsfl.ledger.block import Block, SignedHead
from capsfl.ledger.errors import DamageError, Divergence, LedgerError
from capsfl.ledger.keys import Signer, hospital_id
from capsfl.ledger.records import Genesis, Record, Registration, RoundRecord, record_id

_NO_PREDECESSOR = "0" * 64


@dataclass
class _Index:
    """What the rules need to know about the records so far."""

    heights: MutableMapping[str, int] = field(default_factory=dict)  # record id -> height
    hospitals: MutableMapping[str, str] = field(default_factory=dict)  # id or case-folded name -> id
    rounds: MutableMapping[tuple[str, int], RoundRecord] = field(default_factory=dict)
    latest: MutableMapping[str, int] = field(default_factory=dict)  # task -> its last round

    def overlay(self) -> "_Index":
        """Returns a view of this index that takes additions without changing it."""
        return _Index(**{item.name: ChainMap({}, getattr(self, item.name)) for item in fields(self)})

    def absorb(self, overlay: "_Index") -> None:
        """Takes over what was added to an overlay of this index."""
        for item in fields(self):
            getattr(self, item.name).update(getattr(overlay, item.name).maps[0])


class History:
    """A valid chain of blocks: it grows by `extend`, which admits a block only if every rule holds.

    The rules: blocks link, are signed by the key in the genesis record, and hold at least one record; no
    record appears twice; hospitals register once, under names that differ in more than case; a round names
    registered hospitals only, and the rounds of a task only go up.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.hashes: list[bytes] = []
        self._roots: list[bytes] = []
        self._frontier = merkle.Frontier()
        self._index = _Index()

    @property
    def genesis(self) -> Genesis:
        """The first record; the history must not be empty."""
        genesis = self.blocks[0].records[0]
        assert isinstance(genesis, Genesis)
        return genesis

    @property
    def rounds(self) -> Mapping[tuple[str, int], RoundRecord]:
        """The round records by task and number, in the order of the chain."""
        return self._index.rounds

    def holding(self, record: Record) -> Block | None:
        """Returns the block that holds exactly this record, or None."""
        height = self._index.heights.get(record_id(record))
        return None if height is None else self.blocks[height]

    def head(self, size: int | None = None) -> SignedHead:
        """Returns the signed head of the first `size` blocks (all by default)."""
        size = len(self.blocks) if size is None else size
        assert 0 < size <= len(self.blocks)
        genesis = self.genesis
        signature = self.blocks[size - 1].signature
        return SignedHead(genesis.chain_id, genesis.public_key, size, self._roots[size - 1], signature)

    def next_block(self, records: Sequence[Record], signer: Signer) -> Block:
        """Returns the signed block that would extend this history by `records`, without admitting it.

        Raises:
            LedgerError: a rule does not allow one of the records here, or the key is not the owner's.
        """
        self._admitted(records)
        header = self._expected_header(records)
        if signer.hospital_id() != header["signer"]:
            raise LedgerError(f"the key of {signer.hospital_id()} does not own this chain: {header['signer']} does")
        unsigned = Block(**header, records=tuple(records), signature=b"")
        frontier = self._frontier.copy()
        frontier.append(unsigned.hash())
        head = SignedHead.sign(signer, header["chain_id"], frontier.size, frontier.root())
        return Block(**header, records=tuple(records), signature=head.signature)

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
        additions = self._admitted(block.records)
        for name, expected in self._expected_header(block.records).items():
            found = getattr(block, name)
            if found != expected:
                raise LedgerError(f"{name} is {str(found)[:80]!r}, not {expected!r}")
        frontier = self._frontier.copy()
        frontier.append(block.hash())
        genesis = _first(self.blocks[0].records if self.blocks else block.records)
        root = frontier.root()
        if not SignedHead(genesis.chain_id, genesis.public_key, frontier.size, root, block.signature).is_signed():
            raise LedgerError("the signature is not the owner's over this block and all before it")
        self.blocks.append(block)
        self.hashes.append(block.hash())
        self._roots.append(root)
        self._frontier = frontier
        self._index.absorb(additions)

    def _expected_header(self, records: Sequence[Record]) -> dict[str, Any]:
        genesis = _first(self.blocks[0].records if self.blocks else records)
        leaves = [merkle.leaf_hash(canonical.encode(record.to_canonical())) for record in records]
        return {
            "chain_id": genesis.chain_id,
            "height": len(self.blocks),
            "previous": self.hashes[-1].hex() if self.blocks else _NO_PREDECESSOR,
            "records_root": merkle.root(leaves).hex(),
            "signer": hospital_id(genesis.public_key),
        }

    def _admitted(self, records: Sequence[Record]) -> _Index:
        """Returns the index with the records in it, or says which rule one of them breaks."""
        height = len(self.blocks)
        index = self._index.overlay()
        if not records:
            raise LedgerError("a block holds at least one record")
        for position, record in enumerate(records):
            if isinstance(record, Genesis) != (height == 0 and position == 0):
                raise LedgerError("a chain begins with a genesis record, and holds no other")
            if index.heights.setdefault(record_id(record), height) != height or (record in records[:position]):
                raise LedgerError(f"this {record.type} record is already in the chain")
            if isinstance(record, Registration):
                _register(record, index)
            elif isinstance(record, RoundRecord):
                _enter_round(record, index)
        return index


def compare_rounds(recorded: RoundRecord, rerun: RoundRecord) -> None:
    """Checks that a round run again gave what is recorded of it.

    Raises:
        Divergence: it did not; the error names the round and the first tensor, or else field, that differs.
    """
    if recorded == rerun:
        return
    where = f"task {recorded.task}, round {recorded.round}"
    leaf = first_difference(dict(recorded.leaves), dict(rerun.leaves))
    if leaf is not None:
        raise Divergence(
            f"{where}: tensor {leaf} is not the recorded one: the run is not the one this ledger records",
            task=recorded.task,
            round=recorded.round,
            leaf=leaf,
        )
    name = next(item.name for item in fields(recorded) if getattr(recorded, item.name) != getattr(rerun, item.name))
    found, expected = str(getattr(rerun, name))[:80], str(getattr(recorded, name))[:80]
    raise Divergence(
        f"{where}: {name} is {found}, recorded is {expected}: the run is not the one this ledger records",
        task=recorded.task,
        round=recorded.round,
    )


def first_difference(recorded: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Returns the first path, in sorted order, that one side lacks or has with another digest."""
    paths = sorted({*recorded, *found})
    return next((path for path in paths if recorded.get(path, "") != found.get(path, "")), None)


def _first(records: Sequence[Record]) -> Genesis:
    if not records or not isinstance(records[0], Genesis):
        raise LedgerError("a chain begins with a genesis record")
    return records[0]


def _register(record: Registration, index: _Index) -> None:
    # Ids and names share one table, so that no hospital can pass for another by taking its id as a name.
    for alias in (record.hospital_id, record.name.casefold()):
        if alias in index.hospitals:
            raise LedgerError(f"registration.name: {record.name!r} or its key is already registered")
        index.hospitals[alias] = record.hospital_id


def _enter_round(record: RoundRecord, index: _Index) -> None:
    members = [index.hospitals.get(name.casefold()) for name in record.cohort]
    for name, member in zip(record.cohort, members, strict=True):
        if member is None:
            raise LedgerError(f"round.cohort: {name!r} is not registered: append its Registration first")
    if len(set(members)) != len(members):
        raise LedgerError("round.cohort: a hospital is named twice, by its name and its id")
    latest = index.latest.get(record.task, -1)
    if record.round <= latest:
        raise LedgerError(f"round.round: {record.round} of task {record.task!r} comes after round {latest}")
    index.rounds[record.task, record.round] = record
    index.latest[record.task] = record.round
