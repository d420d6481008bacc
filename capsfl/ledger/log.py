"""Reading a log: which blocks stand, and whether what follows them is a torn write or damage."""

import io
import os
from pathlib import Path
from typing import BinaryIO

from capsfl.ledger import storage
from capsfl.ledger.block import Block, SignedHead
from capsfl.ledger.errors import DamageError, LedgerError, StorageError
from capsfl.ledger.history import History

_MAX_HEAD_BYTES = 4096


def survey(folder: Path | str) -> tuple[History, int, LedgerError | None]:
    """Reads a ledger as far as it holds: its blocks, the bytes of log they take, and the first fault."""
    folder = Path(folder)
    try:
        head = SignedHead.decode(storage.read_whole(folder / "head", _MAX_HEAD_BYTES))
    except StorageError as error:
        return History(), 0, error
    except LedgerError as error:
        return (
            History(),
            0,
            DamageError(f"{folder / 'head'}: {error}: set the folder aside and resume from a checkpoint"),
        )
    try:
        with (
            storage.open_regular(folder / "log", os.O_RDONLY) as descriptor,
            os.fdopen(descriptor, "rb", closefd=False) as stream,
        ):
            history, end, fault = parse(stream, head.size)
    except StorageError as error:
        return History(), 0, error
    if fault is None and not (0 < head.size <= len(history.blocks) and history.head(head.size) == head):
        fault = DamageError(
            f"{folder / 'head'}: not the head of this log: set the folder aside and resume from a checkpoint"
        )
    return history, end, fault


def parse(stream: BinaryIO, committed: int | None) -> tuple[History, int, DamageError | None]:
    """Reads blocks as far as they hold, and says how many bytes they took and what the first fault is.

    Args:
        stream: The log.
        committed: Number of blocks that must be whole; a torn frame after them just ends the log. None when
            every byte must belong to a whole block.
    """
    history, end = History(), 0
    while True:
        height = len(history.blocks)
        try:
            payload = storage.read_frame(stream)
            if payload is None:
                missing = committed is not None and height < committed
                fault = DamageError(f"block {height}: the log ends before it", height=height) if missing else None
                return history, end, fault
            history.extend(Block.decode(payload))
        except storage.TornFrame as torn:
            lost = committed is None or height < committed
            fault = DamageError(f"block {height}: {torn}", height=height) if lost else None
            return history, end, fault
        except DamageError as error:
            return history, end, error
        except LedgerError as error:
            return history, end, DamageError(f"block {height}: {error}", height=height)
        end += storage.framed_length(payload)


def parse_whole(data: bytes) -> History:
    """Returns the chain in an exported log.

    Raises:
        DamageError: it is empty or not wholly valid; names the first bad height.
    """
    history, _, fault = parse(io.BytesIO(data), None)
    if fault is not None:
        raise fault
    if not history.blocks:
        raise DamageError("block 0: the log is empty", height=0)
    return history
