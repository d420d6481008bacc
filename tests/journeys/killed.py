"""Runs `capsfl` and dies by SIGKILL just before a chosen touch of the file system.

    python killed.py EVENT PATTERN COUNT -- WORDS ...

EVENT is one of Python's audit events (os.mkdir, os.rename, open), PATTERN a regular expression on the path it touches
(the new path of a rename), COUNT which of the matching events is the last thing not to happen. A kill is then as
abrupt as from outside and always at the same moment.
"""

import os
import re
import signal
import sys
from typing import Any

from capsfl.cli import main

TOUCHED = {"os.mkdir": 0, "os.rename": 1, "open": 0}


def arm(event: str, pattern: str, count: int) -> None:
    """Sets the trap."""
    wanted, left = re.compile(pattern), count

    def trap(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name == event and wanted.search(str(arguments[TOUCHED[event]])):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(trap)


if __name__ == "__main__":
    given_event, given_pattern, given_count, _, *words = sys.argv[1:]
    arm(given_event, given_pattern, int(given_count))
    main(words)
