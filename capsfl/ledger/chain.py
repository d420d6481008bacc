"""The ledger of a run: a chain of signed blocks in a folder, one writer at a time.

    folder/log    the blocks, framed; only ever appended to
    folder/head   the signed head of the acknowledged blocks, replaced after the log is on disk
    folder/lock   held by the writer

An append writes and syncs the log, then replaces the head. After a crash, whole signed blocks past the head
are kept (they may have been acknowledged had the crash come later), a torn one is dropped; a fault within the
blocks the head vouches for is damage and never trimmed.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from capsfl.ledger import storage
from capsfl.ledger.block import Block, SignedHead
from capsfl.ledger.consensus import ConsensusRules
from capsfl.ledger.errors import Divergence, LedgerError
from capsfl.ledger.history import History, compare_rounds
from capsfl.ledger.keys import Signer
from capsfl.ledger.log import parse, parse_whole, survey
from capsfl.ledger.manifests import Manifest
from capsfl.ledger.records import Genesis, Record, RoundRecord
from capsfl.ledger.rules import Index
from capsfl.ledger.statements import Registration


class Ledger:
    """An append-only record, opened by `create`, `open` or `restore`; a context manager that frees the lock.

    With a signer it is the folder's only writer; without one it only reads and holds no lock.
    """

    def __init__(self, folder: Path, history: History, end: int, signer: Signer | None, held: ExitStack) -> None:
        self.folder = folder
        self._history = history
        self._end = end  # length of the log in bytes, up to the last block
        self._signer = signer
        self._failed = False
        self._frames: list[bytes] = []  # of the blocks that were exported before
        self.approvers: Callable[[], Iterable[Signer]] = tuple  # keys that approve what is appended
        self._unlock = weakref.finalize(self, held.close)

    @classmethod
    def create(
        cls,
        folder: Path | str,
        *,
        signer: Signer,
        chain_id: str,
        registrations: Sequence[Registration] = (),
        rules: ConsensusRules | None = None,
    ) -> "Ledger":
        """Starts a ledger in a new or empty folder, with these hospitals and rules in its first block.

        Raises:
            LedgerError: the folder already holds a ledger, or something a creation did not leave there.
        """
        genesis = Genesis(chain_id, signer.public_key)
        stated = () if rules is None else (rules,)
        block = History().next_block((genesis, *stated, *registrations), signer)
        return cls._begin(Path(folder), storage.frame(block.encode()), signer)

    @classmethod
    def open(cls, folder: Path | str, signer: Signer | None = None) -> "Ledger":
        """Opens a ledger and checks all of it; with a signer, for writing.

        Raises:
            DamageError: blocks or head are not what was signed; names the first bad height.
            LockedError: a writer is at work.
            LedgerError: no ledger there, or the signer does not own it.
        """
        folder = Path(folder)
        if not cls.exists(folder):
            raise LedgerError(f"{folder}: no ledger here (no head file): create it, or restore it from a checkpoint")
        with ExitStack() as held:
            if signer is not None:
                held.enter_context(storage.locked(folder / "lock"))
            history, end, fault = survey(folder)
            if fault is not None:
                raise fault
            if signer is not None:
                if signer.public_key != history.genesis.public_key:
                    raise LedgerError(f"{folder}: the key of {signer.hospital_id()} does not own this ledger")
                storage.write_from(folder / "log", end, b"")
                storage.replace(folder / "head", history.head().encode())
            return cls(folder, history, end, signer, held.pop_all())

    @classmethod
    def exists(cls, folder: Path | str) -> bool:
        """Tells whether a folder holds a ledger that was acknowledged."""
        return os.path.lexists(Path(folder) / "head")

    @classmethod
    def restore(cls, folder: Path | str, data: bytes, *, signer: Signer) -> "Ledger":
        """Opens the ledger of a run resumed from a checkpoint that carries the log `data`.

        An absent ledger is rebuilt from the data; one that is there is reconciled with it.

        Raises:
            DamageError: `data` is not a log of valid blocks.
            Divergence: the two are not one history.
        """
        folder = Path(folder)
        if not cls.exists(folder):
            return cls._begin(folder, data, signer)
        ledger = cls.open(folder, signer)
        try:
            ledger.reconcile(data)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def append(self, *records: Record) -> Block:
        """Adds records in one block and returns the block, on disk when this returns.

        Appending records that a block holds already returns that block and writes nothing. After an error from
        the file system the append may or may not have happened: this object refuses further work, and opening
        the ledger again tells. Where the chain's rules ask for approvals, they are those of `approvers`.

        Raises:
            Divergence: another record of the same round is there, or its hospitals signed something else; names the
                first tensor that differs.
            StorageError: the file system refused.
            LedgerError: a rule forbids a record, or the ledger was opened for reading.
        """
        signer = self._writer()
        holders = [self._chain.holding(record) for record in records]
        if holders and holders[0] is not None and all(held is holders[0] for held in holders):
            return holders[0]
        for record in records:
            if isinstance(record, RoundRecord) and (recorded := self.find(record.task, record.round)) is not None:
                compare_rounds(recorded, record)
                where = f"task {record.task}, round {record.round}"
                raise Divergence(f"{where}: what its hospitals signed is not what is recorded")
        block = self._chain.next_block(records, signer, self.approvers())
        self._write([block])
        return block

    @property
    def index(self) -> Index:
        """What the records so far add up to: members and their keys, commitments, ballots, decisions, policies."""
        return self._chain.index

    def find(self, task: str, round: int) -> RoundRecord | None:
        """Returns the record of one round, or None."""
        return self._chain.rounds.get((task, round))

    def height_of(self, task: str, round: int) -> int:
        """Returns the height of the block that records a round, or that of the next block."""
        record = self.find(task, round)
        block = None if record is None else self._chain.holding(record)
        return len(self._chain.blocks) if block is None else block.height

    def manifest(self, record: RoundRecord, contents: str, files: Mapping[str, str]) -> Manifest:
        """Returns the owner's signed manifest of a round's checkpoint, its files as `{path: SHA-256 in hex}`."""
        return Manifest.of(record, contents, files, self._writer(), self.index.binding)

    def rounds(self) -> tuple[RoundRecord, ...]:
        """Returns the round records in the order of the chain."""
        return tuple(self._chain.rounds.values())

    def blocks(self) -> tuple[Block, ...]:
        """Returns all blocks, lowest first."""
        return tuple(self._chain.blocks)

    def head(self) -> SignedHead:
        """Returns the signed head; its `encode()` is what a witness keeps."""
        return self._chain.head()

    def export(self) -> bytes:
        """Returns the log, to be stored beside the weights; `restore` rebuilds the ledger from it alone."""
        self._frames += [storage.frame(block.encode()) for block in self._chain.blocks[len(self._frames) :]]
        return b"".join(self._frames)

    def reconcile(self, data: bytes) -> None:
        """Brings this ledger and the log of a checkpoint together: the longer of one history stays.

        Raises:
            DamageError: `data` is not a log of valid blocks.
            Divergence: neither extends the other; names the first height, and round, that differs.
        """
        self._writer()
        ours, other = self._chain.blocks, parse_whole(data)
        for mine, theirs in zip(ours, other.blocks, strict=False):
            if mine.hash() == theirs.hash():
                continue
            for record in theirs.records:
                if isinstance(record, RoundRecord) and (recorded := self.find(record.task, record.round)) is not None:
                    compare_rounds(recorded, record)
            raise Divergence(f"{self.folder}: block {mine.height} is not the checkpoint's: the two are not one history")
        if len(other.blocks) > len(ours):
            self._write(other.blocks[len(ours) :])

    def close(self) -> None:
        """Frees the lock; the object then only reads."""
        self._signer = None
        self._unlock()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def _begin(cls, folder: Path, data: bytes, signer: Signer) -> "Ledger":
        wanted = parse_whole(data)
        if wanted.genesis.public_key != signer.public_key:
            raise LedgerError(f"{folder}: the key of {signer.hospital_id()} does not own the ledger to restore")
        with storage.surfaced(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            held.enter_context(storage.locked(folder / "lock"))
            if cls.exists(folder):
                raise LedgerError(f"{folder}: already holds a ledger: open it, or choose an empty folder")
            _check_leftover(folder / "log", wanted)
            storage.write_from(folder / "log", 0, data)
            storage.replace(folder / "head", wanted.head().encode())
            storage.sync_folder(folder.parent)
            return cls(folder, wanted, len(data), signer, held.pop_all())

    @property
    def _chain(self) -> History:
        if self._failed:
            raise LedgerError(f"{self.folder}: an earlier write failed: open the ledger again to see what stands")
        return self._history

    def _writer(self) -> Signer:
        if self._signer is None:
            raise LedgerError(f"{self.folder}: open for reading only: give open() the signer")
        return self._signer

    def _write(self, blocks: Sequence[Block]) -> None:
        data = b"".join(storage.frame(block.encode()) for block in blocks)
        before = len(self._chain.blocks)
        try:
            for block in blocks:
                self._chain.extend(block)
            storage.write_from(self.folder / "log", self._end, data)
            storage.replace(self.folder / "head", self._chain.head().encode())
        except BaseException:
            # Memory and disk may disagree now, and only the disk counts; a block that is refused changes neither.
            self._failed = len(self._history.blocks) > before
            raise
        self._end += len(data)


def _check_leftover(log: Path, wanted: History) -> None:
    # A log without a head is what an interrupted beginning leaves, but also what a deleted head leaves:
    # only blocks that the new log brings back anyway may be overwritten.
    if not os.path.lexists(log):
        return
    with storage.open_stream(log) as stream:
        found, _, fault = parse(stream, committed=0)
    kept = len(found.hashes) <= len(wanted.hashes) and wanted.hashes[: len(found.hashes)] == found.hashes
    if fault is not None or not kept:
        raise LedgerError(f"{log}: a log without its head, and no part of the one to write: set the folder aside")
