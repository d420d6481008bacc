"""The same routing in torch, in a process beside ours that runs only when it is asked to."""

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capsfl.bench.measuring import Sample

VARIANTS = {"torch eager": False, "torch.compile": True}
TIMEOUT_S = 300.0


class PeerError(Exception):
    """The peer cannot do what was asked; the message says why."""


def read_reply(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Waits for the line of JSON that a process answers with.

    Raises:
        PeerError: it is silent for too long, has ended, or tells of an error.
    """
    assert process.stdout is not None
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        if not waiting.select(TIMEOUT_S):
            process.kill()  # it would answer an old question later
            raise PeerError(f"no answer within {TIMEOUT_S:.0f} s")
    line = process.stdout.readline()
    if not line:
        raise PeerError("its process has ended, perhaps for want of memory")
    reply = json.loads(line)
    if "error" in reply:
        raise PeerError(reply["error"])
    return reply


class Peer:
    """A process with torch; use it as a context manager.

    Args:
        python: Interpreter that has torch, or None for this one.
        threads: That torch may use.

    Raises:
        PeerError: torch is not there, or the process does not start.
    """

    def __init__(self, python: Path | None, threads: int) -> None:
        self._process = None
        given = python or (Path(place) if (place := os.environ.get("CAPSFL_PEER_PYTHON")) else None)
        if given is None and importlib.util.find_spec("torch") is None:
            raise PeerError("torch is not installed here; give --peer-python PATH, or set CAPSFL_PEER_PYTHON")
        script = Path(__file__).with_name("torch_einsum.py")
        command = [str(given or sys.executable), str(script), str(threads)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise PeerError(f"{command[0]}: {error.strerror}") from None
        self._folder = tempfile.TemporaryDirectory(prefix="capsfl-bench-")
        try:
            told = self._read()
        except PeerError as error:
            self.close()
            raise PeerError(f"{command[0]} cannot import torch and numpy ({error})") from None
        self.version = told["torch"]
        self.device = "cuda" if told["cuda"] and jax.default_backend() == "gpu" else "cpu"

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
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

    def run(self, variant: str) -> Sample:
        """Runs a prepared variant once."""
        return Sample(**self._ask(do="run", name=variant))

    def forget(self, variant: str) -> None:
        """Drops a prepared variant and its arrays."""
        self._ask(do="forget", name=variant)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError("its process has ended") from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        return read_reply(self._process)
