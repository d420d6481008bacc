"""The same routing in torch, in a process beside ours that runs only when it is asked to."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capsfl.bench.measuring import Sample
from capsfl.bench.peer_process import PeerError, PeerProcess

VARIANTS = {"torch eager": False, "torch.compile": True}


class TorchPeer(PeerProcess):
    """A process with torch; use it as a context manager.

    Args:
        python: Interpreter that has torch, or None for this one.
        threads: That torch may use.

    Raises:
        PeerError: torch is not there, or the process does not start.
    """

    def __init__(self, python: Path | None, threads: int) -> None:
        given = python or (Path(place) if (place := os.environ.get("CAPSFL_PEER_PYTHON")) else None)
        if given is None and importlib.util.find_spec("torch") is None:
            raise PeerError("torch is not installed here; give --peer-python PATH, or set CAPSFL_PEER_PYTHON")
        script = Path(__file__).with_name("torch_einsum.py")
        command = [str(given or sys.executable), str(script), str(threads)]
        super().__init__(command)
        self._folder = tempfile.TemporaryDirectory(prefix="capsfl-bench-")
        try:
            told = self.first_answer()
        except PeerError as error:
            raise PeerError(f"{command[0]} cannot import torch and numpy ({error})") from None
        self.version = told["torch"]
        self.device = "cuda" if told["cuda"] and jax.default_backend() == "gpu" else "cpu"

    def close(self) -> None:
        """Ends the process."""
        super().close()
        self._folder.cleanup()

    def prepare(
        self, variant: str, arrays: Sequence[Any], *, num_iters: int, gradient: bool
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Runs one variant twice; returns what it needed, and its output or its gradients.

        Raises:
            PeerError: torch refused; the message says why.
        """
        given, got = (os.path.join(self._folder.name, name) for name in ("given.npz", "got.npz"))
        inputs, weights = (np.asarray(array) for array in arrays)
        np.savez(given, u=inputs, w=weights)
        told = self._ask(
            do="prepare",
            name=variant,
            compiled=VARIANTS[variant],
            arrays=given,
            results=got,
            num_iters=num_iters,
            gradient=gradient,
            device=self.device,
        )
        facts = {
            "lower_s": None,
            "compile_s": told["first_s"] if VARIANTS[variant] else None,
            "temporary_bytes": told["peak_bytes"],
            "argument_bytes": inputs.nbytes + weights.nbytes,
            "output_bytes": None,
        }
        with np.load(got) as results:
            return facts, [results[name] for name in results.files]

    def run(self, variant: str, repeats: int = 1) -> Sample:
        """Runs a prepared variant, `repeats` times without waiting in between; the sample is their mean."""
        return Sample(**self._ask(do="run", name=variant, repeats=repeats))

    def forget(self, variant: str) -> None:
        """Drops a prepared variant and its arrays."""
        self._ask(do="forget", name=variant)

    def _ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.answer()
