"""The phantom on disk: a folder of hospitals with their manifest, written by several processes, resumable."""

import csv
import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from capsfl.ct.errors import StorageError
from capsfl.ct.phantom.anatomy import patient
from capsfl.ct.phantom.cohort import PhantomConfig, Subject, cohort
from capsfl.ct.phantom.scanners import acquire
from capsfl.ct.phantom.series import write_mask, write_series
from capsfl.workers import count_cores, die_with_parent

_VERSION = 2
_COLUMNS = ("patient", "hospital", "image", "scanner", "label", "mask", "split")


class PhantomMismatch(ValueError):
    """A folder already holds something other than the phantom asked for."""


def write_hospitals(out: Path, *, config: PhantomConfig, processes: int | None = None, progress: bool = True) -> Path:
    """Write hospitals of synthetic patients: DICOM series, lesion masks and a manifest.

    A patient's files depend on the configuration and the patient alone, not on `processes`. Patients already
    there are kept, so an interrupted call is completed by repeating it.

    Args:
        out: Folder of the hospitals; created if absent.
        config: Cohort and acquisition.
        processes: How many patients are drawn at once; by default one a CPU.
        progress: Whether to show a bar on the terminal.

    Returns:
        The manifest, `out/manifest.csv`; its image and mask columns are relative to `out`.

    Raises:
        PhantomMismatch: The folder holds a phantom of another configuration, or another manifest.
        ValueError: `processes` is less than 1.
        StorageError: The folder cannot be written or its disk is full; finished patients stay.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes={processes}: at least one process is needed; leave it out for one a CPU")
    out = Path(out)
    subjects = cohort(config)
    with _one_line_errors(out):
        _claim(out, config)
        pending = [subject for subject in subjects if not _is_complete(out, subject)]
        workers = min(processes or count_cores(), len(pending))
        with _bar(progress) as bar:
            task = bar.add_task("phantom patients", total=len(subjects), completed=len(subjects) - len(pending))
            for _ in _write_all(out, config, pending, workers):
                bar.advance(task)
        manifest = out / "manifest.csv"
        _write_text(manifest, _manifest(subjects))
    return manifest


def _bar(show: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)


@contextmanager
def _one_line_errors(out: Path) -> Iterator[None]:
    """Tell a full or read-only disk in one line that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        place = error.filename or str(out)
        remedy = f"{error.strerror or error}; free space or choose a folder that can be written"
        raise StorageError(f"{place}: {remedy}") from error


def _claim(out: Path, config: PhantomConfig) -> None:
    """Create the folder and record the configuration, or check that it is the recorded one."""
    record, manifest = out / "phantom.json", out / "manifest.csv"
    wanted = {"version": _VERSION, **config.model_dump()}
    if record.exists():
        try:
            found = dict(json.loads(record.read_text()))
        except (ValueError, TypeError):
            raise PhantomMismatch(f"{record}: not readable as JSON; remove the folder or choose another") from None
        if found != wanted:
            keys = sorted(key for key in wanted.keys() | found.keys() if found.get(key) != wanted.get(key))
            there = ", ".join(f"{key}={found.get(key)}" for key in keys)
            asked = ", ".join(f"{key}={wanted.get(key)}" for key in keys)
            raise PhantomMismatch(
                f"{out}: holds a phantom with {there}, but {asked} was asked for; choose another folder"
            )
        return
    if manifest.exists():
        raise PhantomMismatch(f"{manifest}: was not written by the phantom; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_text(record, json.dumps(wanted, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, newline="")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _paths(out: Path, subject: Subject) -> tuple[Path, Path]:
    return out / subject.hospital / subject.id, out / "masks" / f"{subject.id}.nii.gz"


def _is_complete(out: Path, subject: Subject) -> bool:
    return all(path.exists() for path in _paths(out, subject))


def _write_all(out: Path, config: PhantomConfig, pending: list[Subject], workers: int) -> Iterator[None]:
    """Write patients, yielding after each."""
    if workers <= 1:
        for subject in pending:
            _write_patient(out, config, subject)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent) as pool:
        try:
            with _single_threaded_children():
                remaining = {pool.submit(_write_patient, out, config, subject) for subject in pending}
            while remaining:
                done, remaining = wait(remaining, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                    yield
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Give child processes started meanwhile one BLAS thread each: the processes already fill the CPUs."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _write_patient(out: Path, config: PhantomConfig, subject: Subject) -> None:
    """Write one patient's series and mask beside their places, then rename them there."""
    folder, mask_path = _paths(out, subject)
    partial = folder.with_name(f".{folder.name}.partial")
    partial_mask = mask_path.with_name(f".{mask_path.name.removesuffix('.nii.gz')}.partial.nii.gz")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        mask_path.parent.mkdir(exist_ok=True)
        hu, _, lesion, geometry = acquire(
            patient(subject.seed, positive=subject.positive, pattern=subject.pattern), subject.scanner,
            matrix=config.matrix, slice_thickness_mm=config.slice_thickness_mm, seed=subject.seed,
        )  # fmt: skip
        write_series(partial, hu, geometry, subject=subject, identity=config.model_dump_json())
        write_mask(partial_mask, lesion, geometry)
        shutil.rmtree(folder, ignore_errors=True)
        partial_mask.replace(mask_path)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        partial_mask.unlink(missing_ok=True)
        raise


def _manifest(subjects: tuple[Subject, ...]) -> str:
    """One row a patient; `split` stays blank, for the training configuration to decide."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for subject in subjects:
        folder, mask = _paths(Path(), subject)
        row = subject.id, subject.hospital, folder.as_posix(), subject.scanner.id
        writer.writerow((*row, subject.label, mask.as_posix(), ""))
    return text.getvalue()
