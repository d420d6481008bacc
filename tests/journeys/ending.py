"""A process of two that ends badly, or waits for the other one that does.

    python ending.py PORT INDEX MANNER

Process 0 waits in `by_first` or does the work that process 1 waits for; one of them fails, dies, or differs.
"""

import os
import signal
import sys
import time
from typing import NoReturn

from capsfl.processes import ProcessesConfig, agree, by_first, in_turn, joined


def die() -> NoReturn:
    """Ends as abruptly as from outside."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def fail() -> NoReturn:
    """Ends as a refusal does."""
    raise ValueError("volumes/A-001.zarr: No space left on device")


def work() -> None:
    """Takes longer than any test waits."""
    time.sleep(300)


def main(port: int, index: int, manner: str) -> None:
    """Joins and ends."""
    config = ProcessesConfig(
        coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=index, start_timeout_s=60, heartbeat_timeout_s=5
    )
    with joined(config):
        print("joined", flush=True)
        if manner == "the other dies":
            by_first("the work", work) if index == 0 else die()
        elif manner == "the first dies":
            by_first("the work", die)
        elif manner == "the other fails":
            by_first("the work", work) if index == 0 else fail()
        elif manner == "the first fails":
            by_first("the work", fail)
        elif manner == "they differ":
            agree("the configuration", str(index))
        elif manner == "all is well":
            agree("the configuration", "same")
            assert by_first("a figure", lambda: {"first": index}) == {"first": 0}
            assert in_turn("a file", lambda: index) == index


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
