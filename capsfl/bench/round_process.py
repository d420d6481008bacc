"""A process with another framework that runs the same round when it is asked to."""

import os
from pathlib import Path

from capsfl.bench import round_peers
from capsfl.bench.measuring import Sample
from capsfl.bench.peer_process import PeerError, PeerProcess

CHECK_LOSS = 2.29056787
"""Mean loss over all records after three rounds without noise, in every framework that does the same work."""
TOLERANCE = 1e-5

PEERS = {
    "torch": "torch==2.13.0",
    "pfl": "torch==2.13.0 pfl==0.6.0",
    "fedjax": "jax git+https://github.com/google/fedjax",
    "flower": 'torch==2.13.0 "flwr[simulation]==1.41.0"',
}
"""What each peer's interpreter, named by CAPSFL_PEER_<NAME>, must have installed."""


class RoundPeer(PeerProcess):
    """A process with another framework; use it as a context manager.

    Raises:
        PeerError: no interpreter is named, the framework is not there, or it does other work.
    """

    TIMEOUT_S = 600.0
    ENDED = "its process has ended; run it by hand to see why"

    def __init__(self, name: str, threads: int) -> None:
        variable = f"CAPSFL_PEER_{name.upper()}"
        python = os.environ.get(variable)
        if not python:
            raise PeerError(f"{variable} names no interpreter")
        command = [python, str(Path(round_peers.__file__)), name, str(threads)]
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        try:
            super().__init__(command, environment=inherited)
        except PeerError as error:
            raise PeerError(f"{variable} = {error}") from None
        try:
            told = self.first_answer()
        except PeerError as error:
            raise PeerError(f"{variable}: {error}") from None
        self.version, self.check_loss = told["version"], told["check_loss"]
        if not abs(self.check_loss - CHECK_LOSS) < TOLERANCE:
            self.close()
            raise PeerError(f"not the same work: its loss after three rounds is {self.check_loss:.8f}")

    def run(self) -> Sample:
        """One round.

        Raises:
            PeerError: it could not.
        """
        self.send(do="run")
        try:
            told = self.answer()
        except PeerError as error:
            raise PeerError(f"a round: {error}") from None
        # Flower computes in other processes, whose time is not its own.
        return Sample(told["wall_s"], float("nan") if told["cpu_s"] is None else told["cpu_s"])
