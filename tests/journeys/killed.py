"""Runs `capsfl` and dies by SIGKILL at a chosen moment; or runs it whole and notes the moments there are.

    python killed.py EVENT PATTERN COUNT DELAY_S -- WORDS ...
    python killed.py record FILE -- WORDS ...

EVENT is one of Python's audit events (open, os.mkdir, os.rename, ...), which come just before a touch of the file
system. PATTERN is a regular expression on the path it touches (the new path of a rename), COUNT which of the matching
events is meant, DELAY_S how long after it the kill comes: with 0 the touch is the last thing not to happen, so that the
moment is always the same; else the kill falls into whatever is at work by then, native code and the kernel included.

Keys and the salt of pseudonyms are secrets that a run draws once. Here they are derived from their files' names, so
that two runs can be compared in every bit of their ledgers.
"""

import hashlib
import json
import os
import re
import secrets
import signal
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

from capsfl.cli import main
from capsfl.ledger import keyfiles
from capsfl.ledger.keys import Signer

TOUCHED = {"open": 0, "os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.remove": 0, "os.rmdir": 0}
"""Which argument of an event is the path."""

save_key = keyfiles.save_key


def save_named_key(_: Signer, path: Path, passphrase: bytes | None = None) -> None:
    """Saves the key that belongs to a file of this name."""
    save_key(Signer(hashlib.sha256(path.name.encode()).digest()), path, passphrase)


# At import, so that training processes do the same.
keyfiles.save_key = save_named_key
secrets.token_bytes = lambda nbytes=None: bytes(nbytes or 32)


def touched(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The path that an event is about to change; None for what changes nothing."""
    if event not in TOUCHED:
        return None
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return None
    path = arguments[TOUCHED[event]]
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None


def arm(event: str, pattern: str, count: int, delay_s: float) -> None:
    """Sets the trap."""
    wanted, left = re.compile(pattern), count

    def die() -> None:
        time.sleep(delay_s)
        os.kill(os.getpid(), signal.SIGKILL)

    def trap(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name == event and (path := touched(name, arguments)) and wanted.search(path):
            left -= 1
            if left == 0 and delay_s == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            elif left == 0:
                Thread(target=die, daemon=True).start()

    sys.addaudithook(trap)


def note_touches() -> list[tuple[float, str, str]]:
    """From now on, rows of seconds, event and path of every touch."""
    start, rows = time.monotonic(), []

    def note(name: str, arguments: tuple[Any, ...]) -> None:
        if path := touched(name, arguments):
            rows.append((time.monotonic() - start, name, path))

    sys.addaudithook(note)
    return rows


def record(file: Path, words: list[str]) -> None:
    """Runs a command and writes its touches as JSON."""
    rows = note_touches()
    try:
        main(words)
    finally:
        file.write_text(json.dumps(rows))


if __name__ == "__main__":
    border = sys.argv.index("--")
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]), sys.argv[border + 1 :])
    else:
        given_event, given_pattern, given_count, given_delay = sys.argv[1:border]
        arm(given_event, given_pattern, int(given_count), float(given_delay))
        main(sys.argv[border + 1 :])
