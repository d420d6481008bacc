"""A process with another framework that runs the same round when it is asked to."""

import json
import os
import selectors
import subprocess
from pathlib import Path
from typing import Any

from capsfl.bench import round_peers
from capsfl.bench.measuring import Sample

CHECK_LOSS = 2.29056787
"""Mean loss over all records after three rounds without noise, in every framework that does the same work."""
TOLERANCE = 1e-5
TIMEOUT_S = 600.0

PEERS = {
    "torch": "torch==2.13.0",
    "pfl": "torch==2.13.0 pfl==0.6.0",
    "fedjax": "jax git+https://github.com/google/fedjax",
    "flower": 'torch==2.13.0 "flwr[simulation]==1.41.0"',
}
"""What each peer's interpreter, named by CAPSFL_PEER_<NAME>, must have installed."""


class RoundPeerError(Exception):
    """The peer cannot be compared; the message says why."""


class RoundPeer:
    """A process with another framework; use it as a context manager.

    Raises:
        RoundPeerError: no interpreter is named, the framework is not there, or it does other work.
    """

    def __init__(self, name: str, threads: int) -> None:
        variable = f"CAPSFL_PEER_{name.upper()}"
        python = os.environ.get(variable)
        if not python:
            raise RoundPeerError(f"{variable} names no interpreter")
        command = [python, str(Path(round_peers.__file__)), name, str(threads)]
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=inherited,
            )
        except OSError as error:
            raise RoundPeerError(f"{variable} = {python}: {error.strerror}") from None
        try:
            told = self._read(variable)
            if not abs(told["check_loss"] - CHECK_LOSS) < TOLERANCE:
                raise RoundPeerError(f"not the same work: its loss after three rounds is {told['check_loss']:.8f}")
        except RoundPeerError:
            self.close()
            raise
        self.version, self.check_loss = told["version"], told["check_loss"]

    def __enter__(self) -> "RoundPeer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def run(self) -> Sample:
        """One round."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"run\n")
            self._process.stdin.flush()
        except OSError:
            raise RoundPeerError("its process has ended") from None
        told = self._read("a round")
        # Flower computes in other processes, whose time is not its own.
        return Sample(told["wall_s"], float("nan") if told["cpu_s"] is None else told["cpu_s"])

    def _read(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            if not waiting.select(TIMEOUT_S):
                raise RoundPeerError(f"{what}: no answer within {TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RoundPeerError(f"{what}: its process has ended; run it by hand to see why")
        return json.loads(line)
