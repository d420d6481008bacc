"""What a study has put on disk, in every bit, but for what may differ between two runs: the clock's figures."""

import hashlib
import io
import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from capsfl.digests import file_digests
from capsfl.ledger.chain import Ledger
from capsfl.ledger.storage import TornFrame, read_frame

CLOCK = {"seconds", "cpu_seconds", "compile_seconds", "peak_memory_bytes"}
LEFTOVERS = ("tmp", "partial", ".old", ".new")
"""Parts of the names that writes have until they are whole."""


def contents(study: Path) -> dict[Hashable, Any]:
    """Everything that a study, finished or not, has committed.

    Volumes, overlays, results and ledger summaries by their bytes; blocks of the ledgers; lines of the curves without
    the clock's figures; of every checkpoint each array (weights, server optimizer, controls, clip norm, key, ledger) by
    dtype, shape and digest of its bytes, and the accountant.
    """
    study = study.absolute()  # as Orbax wants it
    found: dict[Hashable, Any] = {}
    for path in study.rglob("*"):
        place = path.relative_to(study)
        if not path.is_file() or any(is_leftover(part) for part in place.parts):
            continue
        if place.parts[0] == "volumes" or path.name in ("results.json", "ledger.json") or path.suffix == ".png":
            found[str(place)] = path.read_bytes()
        elif path.name == "metrics.jsonl":
            found |= dict(lines(path, place))
        elif path.name == "log" and path.parent.name == "ledger":
            found |= {(str(place), height): block for height, block in enumerate(blocks(path))}
    for step in study.rglob("checkpoints/*/*"):
        if step.name.isdigit():
            found |= dict(arrays(step, step.relative_to(study)))
    return found


def is_leftover(name: str) -> bool:
    """Whether a name is one of an unfinished write."""
    return any(part in name for part in LEFTOVERS)


def lines(path: Path, place: Path) -> Iterator[tuple[Hashable, Any]]:
    """Whole lines of a run's curves by task, round and how often they were there before: a round is written once."""
    seen: dict[Hashable, int] = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            key = (str(place), row["task"], row["round"])
            seen[key] = seen.get(key, 0) + 1
            yield (*key, seen[key]), {name: value for name, value in row.items() if name not in CLOCK}


def blocks(log: Path) -> Iterator[bytes]:
    """Whole blocks of a ledger's log; what a kill cut short is none."""
    stream = io.BytesIO(log.read_bytes())
    try:
        while payload := read_frame(stream):
            yield payload
    except TornFrame:
        return


def arrays(step: Path, place: Path) -> Iterator[tuple[Hashable, Any]]:
    """All that a checkpoint holds."""
    with ocp.StandardCheckpointer() as files:
        for item in ("state", "random", "ledger"):
            for path, leaf in jax.tree_util.tree_leaves_with_path(files.restore(step / item)):
                array = np.asarray(leaf)
                name = jax.tree_util.keystr(path)
                yield (
                    (str(place), item, name),
                    (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).hexdigest()),
                )
    (accountant,) = (step / "accountant").glob("metadata")
    yield (str(place), "accountant"), json.loads(accountant.read_text())


def assert_within(study: Path, unbroken: Mapping[Hashable, Any]) -> None:
    """A killed study holds nothing that the unbroken one does not hold, bit for bit, and a ledger that opens."""
    found = contents(study)
    assert not found.keys() - unbroken.keys(), "what no unbroken run writes"
    assert not {name for name, value in found.items() if unbroken[name] != value}
    for head in study.rglob("ledger/head"):
        Ledger.open(head.parent).close()


def assert_same(study: Path, unbroken: Path) -> None:
    """What was killed and resumed ends as what was not, and nothing of the killed lives lies about."""
    found, expected = contents(study), contents(unbroken)
    assert found.keys() == expected.keys()
    assert not {name for name, value in found.items() if expected[name] != value}
    for head in unbroken.rglob("ledger/head"):
        assert (study / head.relative_to(unbroken)).read_bytes() == head.read_bytes()
    assert not [path for path in study.rglob("*") if is_leftover(path.name)]
    for step in study.rglob("checkpoints/*/*"):
        manifest = step.parents[2] / "manifests" / step.parent.name / f"{step.name}.json"
        signed = dict(json.loads(manifest.read_text())["files"])
        assert signed == file_digests(step), "every file is signed, whenever the kill came"
    assert (study / "report.html").exists() == (unbroken / "report.html").exists()
