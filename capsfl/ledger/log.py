"""Reading a log: which blocks stand, and whether what follows them is a torn write or damage."""

import io
from pathlib import Path
from typing import BinaryIO

from capsfl.ledger import storage
from capsfl.ledger.block import Block, SignedHead
from capsfl.ledger.errors import DamageError, LedgerError, StorageError
from capsfl.ledger.history import History

_MAX_HEAD_BYTES = 4096


def survey(folder: Path | str) -> tuple[History, int, LedgerError | None]:
    """Reads a ledger as far as it holds: its blocks, the bytes of log they take, and the first fault."""
    place, remedy = Path(folder) / "head", "set the folder aside and resume from a checkpoint"
    try:
        head = SignedHead.decode(storage.read_whole(place, _MAX_HEAD_BYTES))
        with storage.open_stream(Path(folder) / "log") as stream:
            history, end, fault = parse(stream, head.size)
    except StorageError as error:
        return History(), 0, error
    except LedgerError as error:
        return History(), 0, DamageError(f"{place}: {error}: {remedy}")
    if fault is None and not (0 < head.size <= len(history.blocks) and history.head(head.size) == head):
        fault = DamageError(f"{place}: not the head of this log: {remedy}")
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
            if payload is not None:
                history.extend(Block.decode(payload))
                end = stream.tell()
                continue
            missing = committed is not None and height < committed
            fault = DamageError(f"block {height}: the log ends before it", height=height) if missing else None
        except storage.TornFrame as torn:
            lost = committed is None or height < committed
            fault = DamageError(f"block {height}: {torn}", height=height) if lost else None
        except DamageError as error:
            fault = error
            fault.height = height  # a block that claims another version does not know its own
        except LedgerError as error:
            fault = DamageError(f"block {height}: {error}", height=height)
        return history, end, fault


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
