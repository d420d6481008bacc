"""Processes on this machine: workers, which must not outlive the one that started them, and those that are gone."""

import os
from multiprocessing import parent_process
from threading import Thread


def die_with_parent() -> None:
    """Ends a worker with its parent, so that a killed command leaves nobody writing in its folder.

    The initializer of every pool: a worker waits for its next task on a pipe whose other end it holds itself, and
    would do so for ever.
    """
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def is_running(process: int) -> bool:
    """Tells whether a process of this machine is there: what a killed one left half-written may be removed."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True
