"""A study from scans to page: read this file top to bottom, then `capsfl/training`, and you have seen the whole road.

    phantom / DICOM / NIfTI -> standard volumes, or pictures -> hospitals -> federated rounds (segmentation,
    classification) -> a checkpoint and a signed record per round -> results beside their controls -> one HTML page

A study trains several arms on the same split: federated, with noise, pooled, every hospital alone. An arm is one
run, or one run per hospital; a run owns a folder with checkpoints, ledger, metrics and results.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import jax
from rich.console import Console

from capsfl import evaluation
from capsfl.config import StudyConfig
from capsfl.ct.ingest import IndexEntry, ingest, read_index
from capsfl.ct.phantom import write_hospitals
from capsfl.learning.patients import load_patient
from capsfl.processes import agree, by_first, in_turn, is_first
from capsfl.profiling import is_traced
from capsfl.progress import show_rounds
from capsfl.report.page import build_page
from capsfl.study import Split, StudyFolder, split_patients, write_json
from capsfl.training.checks import cautions_of, check_before_training, weights_of
from capsfl.training.run import Run, plan_runs
from capsfl.training.stages import read_results, train_run
from capsfl.workers import count_cores, die_with_parent


def train(config: StudyConfig, *, console: Console, profile: bool = False, command: str = "") -> Path:
    """Runs or resumes a study.

    Args:
        config: the whole configuration.
        console: where progress goes.
        profile: whether to trace a few rounds of the first run.
        command: what was typed, for the pages that say how to make a figure again; empty where nothing was.

    Returns:
        The page, `out/report.html`.

    Raises:
        ValueError: anything a user can mend, in one line that names the file or field.
    """
    agree("the configuration", config.digest() + config.devices.shared())
    with in_turn("the study folder", lambda: StudyFolder.open(config)) as folder:
        if command:
            folder.record(command=command)
        return train_study(config, folder, console=console, profile=profile)


def train_study(config: StudyConfig, folder: StudyFolder, *, console: Console, profile: bool = False) -> Path:
    """Runs or resumes a study in its folder, from scans to page."""
    by_first("volumes", lambda: prepare_volumes(config, folder, console=console))
    split = load_split(config, read_index(folder.path / "volumes"))
    hospitals = sorted({patient.hospital for patient in split.train})
    roster = folder.seat(hospitals, places=config.places)
    folder.record(kinds=sorted({"volume" if patient.pictures is None else "pictures" for patient in split.train}))
    console.print(
        f"[bold]{len(split.train)}[/] patients to train on, [bold]{len(split.validation)}[/] to validate, "
        f"[bold]{len(split.test)}[/] never trained on, in {len(hospitals)} hospitals"
    )
    runs = plan_runs(config, folder.path, split, roster=roster)
    runs[0] = replace(runs[0], profile=profile)
    check_before_training(config, split, runs)
    if found := weights_of(config):
        folder.keep_weights(found)
    for caution in cautions_of(runs, split):
        console.print(f"[yellow]warning[/] {caution}", highlight=False, soft_wrap=True)
    with folder.stage("controls"):
        controls = evaluation.score_controls(split, config) if is_first() else None
    rounds = {name: stage.rounds for name, stage in config.stages.items()}
    with (
        folder.stage("training"),
        show_rounds({run.place: run.folder for run in runs}, rounds, console=console),
    ):
        train_runs(runs, folder.path / "volumes", split, controls)

    if profile:
        place = runs[0].folder / "profile"
        told = (
            f"{place}, for TensorBoard, Perfetto or XProf" if is_traced(runs[0].folder) else "no round was left to run"
        )
        console.print(f"profile: {told}", soft_wrap=True, highlight=False)

    def conclude() -> str:
        for arm in config.arms:
            if arm.has_members:
                members = {str(run.member): read_results(run) for run in runs if run.arm == arm}
                average = evaluation.average_members(members, partition=arm.partition)
                write_json(folder.path / arm.name / "results.json", average)
        folder.finish()
        return str(build_page(folder.path))

    return Path(by_first("the page", conclude))


def prepare_volumes(config: StudyConfig, folder: StudyFolder, *, console: Console) -> None:
    """Brings every scan into a standard volume on disk, generating the phantom first where there is no source."""
    source = Path(config.data.source)
    if config.data.source and not source.exists():
        raise ValueError(f"data.source = {source}: no such file or folder; paths start from the working directory")
    if not config.data.source:
        assert config.phantom is not None  # StudyConfig refuses to be without both
        with folder.stage("phantom"):
            console.print("[bold]phantom[/] chest CT of three hospitals, written as DICOM series")
            source = write_hospitals(folder.path / "phantom", config=config.phantom)
    with folder.stage("ingest"):
        console.print(f"[bold]ingest[/] {source} into standard volumes, preset {config.data.volumes.preset}")
        report = ingest(
            source,
            folder.path / "volumes",
            config=config.data.volumes,
            collection=config.data.collection if config.data.source else None,
            reader=config.data.reader,
            root=Path(config.data.root) if config.data.root else None,
            on_error=config.data.on_error,
        )
        for line in (*report.notes, *(f"left out: {who}: {fault}" for who, fault in report.failed)):
            console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)


def load_split(config: StudyConfig, entries: Sequence[IndexEntry]) -> Split:
    """Reads volumes or pictures and splits patients, never slices; scans without mask and label wait for `predict`."""
    patients = [load_patient(entry, field=config.data.field, volumes=config.data.volumes) for entry in entries]
    known = [patient for patient in patients if patient.truth is not None or patient.label is not None]
    return split_patients(known, config.data, seed=config.split_seed)


def train_runs(runs: Sequence[Run], volumes: Path, split: Split, controls: evaluation.Controls | None) -> None:
    """Trains runs side by side on a CPU, whose cores one small network does not fill; else one after the other.

    Side by side each has a process of its own, so that its peak memory is its own and not that of runs before. Of
    several processes each takes part in every run, so that they are all at the same one.
    """
    jobs = min(runs[0].config.jobs or default_jobs(runs[0].config), len(runs))
    if jax.process_count() > 1:
        jobs = 1
    if jobs == 1:
        for run in runs:
            train_run(run, split, controls)
        return
    with ThreadPoolExecutor(jobs, thread_name_prefix="run") as pool:
        futures = [pool.submit(train_in_process, run, volumes, controls) for run in runs]
        try:
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"jobs = {jobs}: a training process ended abruptly, perhaps for lack of memory; run the same command "
                "again to resume, with fewer --jobs"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def default_jobs(config: StudyConfig) -> int:
    """One run at a time where runs share accelerators or devices, else one per core."""
    alone = config.devices.parallel != "single" or jax.default_backend() != "cpu"
    return 1 if alone else count_cores()


def train_in_process(run: Run, volumes: Path, controls: evaluation.Controls | None) -> None:
    """`train_run` in a new process.

    Not in one pool that replaces its workers after every task, which may wait for ever (CPython issue 115634).
    """
    # "spawn", since a forked JAX deadlocks; the process reads the volumes again rather than have them pickled.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
        pool.submit(train_in_worker, run, volumes, controls).result()


def train_in_worker(run: Run, volumes: Path, controls: evaluation.Controls | None) -> None:
    """`train_run` on volumes that are read here."""
    train_run(run, load_split(run.config, read_index(volumes)), controls)
