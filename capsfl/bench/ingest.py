"""DICOM series to standard volumes: slices a second and memory, MONAI and SimpleITK doing the same beside it."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from capsfl.bench.ingest_process import CONTESTANTS
from capsfl.bench.machine import describe
from capsfl.bench.measuring import Sample, alternate, ratio
from capsfl.bench.peer_process import PeerError, PeerProcess
from capsfl.ct.dicom import read_dicom
from capsfl.ct.normalize import VolumeConfig, standardize
from capsfl.ct.phantom import SCANNERS, PhantomConfig, acquire, patient
from capsfl.ct.phantom.cohort import cohort
from capsfl.ct.phantom.series import write_series
from capsfl.workers import count_cores

WARM_SLICES = 8
"""Slices of the run before any other, which loads what a library loads when it is first needed."""
ONE_THREAD = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
"""One process a core, with one thread each, is how collections are ingested, by ours and by others."""
SAME_HU = 25.0
"""Means of one cube may differ by this much: linear against Lanczos, and another grid's edges."""


@dataclass(frozen=True)
class IngestBench:
    """Slices a second from DICOM to `half` volumes and memory; MONAI and SimpleITK beside it."""

    quick: bool = False
    """One small phantom series: seconds instead of minutes."""
    series: tuple[Path, ...] = ()
    """Folders of one DICOM series each; by default two of the phantom, of 5 mm and of 1.25 mm."""
    peer_python: Path | None = None
    """Interpreter that has MONAI or SimpleITK; by default CAPSFL_PEER_PYTHON, else this one."""
    budget_s: float = 40.0
    """No further turn begins on a series after this many seconds."""


def measure(options: IngestBench, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every contestant on every series in turns, in as many processes as there are cores.

    Returns:
        The result, JSON-ready: machine, rows by series and contestant, ratios over ours, and what was skipped.

    Raises:
        ValueError: a series' folder is not there, or ours fails on it.
    """
    for folder in options.series:
        if not folder.is_dir():
            raise ValueError(f"series = {folder}: no such folder; give folders of one DICOM series each")
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="capsfl-bench-") as work:
        for name, folder in _series(options, Path(work)).items():
            rows += _measure_series(name, folder, Path(work), options, skipped)
            say(f"ingest, {name}")
    return {
        "benchmark": "ingest",
        "quick": options.quick,
        "machine": describe(),
        "cores": count_cores(),
        "rows": rows,
        "against_ours": _against_ours(rows),
        "skipped": skipped,
    }


class Contestant(PeerProcess):
    """A process that turns series into volumes when asked; use it as a context manager.

    Args:
        name: which one.
        python: interpreter it runs with.

    Raises:
        PeerError: its library is not there, or the process does not start.
    """

    def __init__(self, name: str, python: str) -> None:
        script = Path(__file__).with_name("ingest_process.py")
        command = [python, str(script), name]
        if name == "capsfl":
            command = [python, "-m", "capsfl.bench.ingest_process", name]
        super().__init__(command, environment={**os.environ, **dict.fromkeys(ONE_THREAD, "1")})
        self.version = self.first_answer()["version"]

    def start(self, series: Path, out: Path, grid: dict[str, Any], **wanted: bool) -> None:
        """Has one series turned into a volume; `answer` waits for it and tells of the run.

        Args:
            series: folder.
            out: folder for what it writes.
            grid: our volume's size, spacing, origin and centre, in the order x, y, z.
            **wanted: `memory` for the peak, `check` for the mean of the central cube.

        Raises:
            PeerError: it cannot; the message says why.
        """
        plain = {"memory": False, "check": False}
        self.send(series=str(series), out=str(out), grid=grid, **(plain | wanted))


def _series(options: IngestBench, work: Path) -> dict[str, Path]:
    if options.series:
        return {folder.resolve().name: folder.resolve() for folder in options.series}
    found = {}
    for thickness in (10.0,) if options.quick else (5.0, 1.25):
        matrix = 128 if options.quick else 512
        subject = cohort(PhantomConfig(hospitals=1, patients=1))[0]
        hu, _, _, geometry = acquire(
            patient(1, positive=True), SCANNERS[3], matrix=matrix, slice_thickness_mm=thickness, seed=1
        )
        folder = work / f"phantom {thickness:g} mm"
        folder.mkdir()
        write_series(folder, hu, geometry, subject=subject, identity="bench")
        found[folder.name] = folder
    return found


def _measure_series(
    name: str, folder: Path, work: Path, options: IngestBench, skipped: list[dict[str, str]]
) -> list[dict[str, Any]]:
    scan = read_dicom(folder)
    grid = _grid(scan)
    slices, side = scan.hu.shape[0], scan.hu.shape[1]
    del scan
    few = work / f"few of {name}"
    few.mkdir()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files[: min(WARM_SLICES, len(files))]:
        shutil.copy(path, few)
    rows: dict[str, dict[str, Any]] = {}
    runs = {}
    expected = None
    with ExitStack() as stack:
        for contestant in CONTESTANTS:
            try:
                python = _python(contestant, options)
                team = [stack.enter_context(Contestant(contestant, python)) for _ in range(count_cores())]
                run = partial(_run_team, team, work=work, grid=grid)
                run(few)
                first = run(folder, memory=True, check=True)[0]
            except PeerError as error:
                if contestant == "capsfl":
                    raise ValueError(f"series = {folder}: {error}") from None
                skipped.append({"case": name, "implementation": contestant, "reason": str(error)})
                continue
            expected = first["mean_hu"] if expected is None else expected
            if abs(first["mean_hu"] - expected) > SAME_HU:
                reason = f"another result: mean of {first['mean_hu']:.0f} HU where ours is {expected:.0f}"
                skipped.append({"case": name, "implementation": contestant, "reason": reason})
                continue
            rows[contestant] = {
                "series": name,
                "slices": slices,
                "matrix": side,
                "implementation": contestant,
                "version": team[0].version,
                "peak_bytes": first["peak_bytes"],
                "mean_hu": first["mean_hu"],
            }
            runs[contestant] = partial(_run_timed, run, folder)
        least, most = (1, 1) if options.quick else (5, 9)
        times = alternate(runs, budget_s=options.budget_s, least=least, most=most)
    return [{**row, **times[contestant]} for contestant, row in rows.items()]


def _run_team(team: list[Contestant], folder: Path, *, work: Path, grid: dict[str, Any], **wanted: bool) -> list[dict]:
    """One series in every process at once."""
    for number, process in enumerate(team):
        process.start(folder, work / f"out of {number}", grid, **wanted)
    return [process.answer() for process in team]


def _run_timed(run: Callable[..., list[dict[str, Any]]], folder: Path) -> Sample:
    """Wall time until the last process is done, and the processor time of one, a series' own."""
    told = run(folder)
    return Sample(max(one["wall_s"] for one in told), sum(one["cpu_s"] for one in told) / len(told))


def _grid(scan: Any) -> dict[str, Any]:
    """Our volume's grid in the order x, y, z: what the peers resample to."""
    volume = standardize(scan, config=VolumeConfig(preset="half"))
    middle = volume.affine @ [*(np.array(volume.hu.shape) / 2), 1]
    return {
        "size": [int(size) for size in volume.hu.shape[::-1]],
        "spacing": [float(step) for step in volume.spacing_mm[::-1]],
        "origin": [float(value) for value in volume.affine[:3, 3]],
        "center": [float(value) for value in middle[:3]],
    }


def _python(contestant: str, options: IngestBench) -> str:
    given = options.peer_python or os.environ.get("CAPSFL_PEER_PYTHON")
    return str(given) if given and contestant != "capsfl" else sys.executable


def _against_ours(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as long, and how much more memory, the others take."""
    ours = {row["series"]: row for row in rows if row["implementation"] == "capsfl"}
    return [
        {
            "series": row["series"],
            "implementation": row["implementation"],
            "wall": ratio(row["wall_s"], ours[row["series"]]["wall_s"]),
            "process_cpu": ratio(row["process_cpu_s"], ours[row["series"]]["process_cpu_s"]),
            "peak": row["peak_bytes"] / ours[row["series"]]["peak_bytes"] if row["peak_bytes"] else None,
        }
        for row in rows
        if row["implementation"] != "capsfl"
    ]
