"""A study from scans to page; read this file top to bottom and you have seen the whole road.

    phantom / DICOM / NIfTI -> standard volumes -> hospitals -> federated rounds (segmentation, classification)
    -> a checkpoint and a signed record per round -> results beside their controls -> one HTML page

A study trains several arms on the same split: federated, with noise, pooled, every hospital alone. An arm is one
run, or one run per hospital; a run owns a folder with checkpoints, ledger, metrics and results.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from capsfl import evaluation
from capsfl.audit import audit_run, chain_of, ledger_summary
from capsfl.checkpoint import check_recorded, open_checkpoints, tensor_leaves
from capsfl.clock import Stopwatch
from capsfl.config import ArmConfig, StudyConfig
from capsfl.ct.ingest import IndexEntry, ingest, read_index
from capsfl.ct.phantom import write_hospitals
from capsfl.federated.devices import on_one_device
from capsfl.federated.federation import Federation, RoundReport, RoundsConfig, draws_noise
from capsfl.federated.hospitals import (
    HospitalSource,
    pool_hospitals,
    seat_hospitals,
    select_hospitals,
    stack_hospitals,
)
from capsfl.federated.patients import PATIENT, number_patients
from capsfl.federated.recorded import recall_chunk, record_choice
from capsfl.federated.round import RoundState
from capsfl.federated.store_writer import rewrite_hospitals_store
from capsfl.federated.stored import open_hospitals_store
from capsfl.learning.classification import Classifier, make_classification_task, masked_slices
from capsfl.learning.patients import Patient, load_patient
from capsfl.learning.segmentation import Segmenter, cut_patches, make_segmentation_task
from capsfl.learning.tasks import Task
from capsfl.ledger.canonical import decimal
from capsfl.ledger.chain import Ledger
from capsfl.ledger.keyfiles import load_key, save_key
from capsfl.ledger.keys import Signer
from capsfl.ledger.records import Registration, RoundRecord, parameters_root
from capsfl.ledger.verify import Status
from capsfl.membership import record_members, vacant_names
from capsfl.privacy.patient_plan import Stage
from capsfl.privacy.plan import PrivacyPlan
from capsfl.privacy.secret import open_secret
from capsfl.processes import agree, by_first, in_turn, is_first
from capsfl.profiling import RoundTrace, is_traced, part, trace_folder
from capsfl.progress import read_rounds, show_rounds
from capsfl.report.page import build_page
from capsfl.study import Split, StudyFolder, split_patients, write_json
from capsfl.workers import count_cores, die_with_parent

RECORDS = "records"
"""Folder in a run's for the records that lie on disk while it trains."""


def train(config: StudyConfig, *, console: Console, profile: bool = False) -> Path:
    """Runs or resumes a study.

    Args:
        config: the whole configuration.
        console: where progress goes.
        profile: whether to trace a few rounds of the first run.

    Returns:
        The page, `out/report.html`.

    Raises:
        ValueError: anything a user can mend, in one line that names the file or field.
    """
    agree("the configuration", config.digest() + config.devices.shared())
    with in_turn("the study folder", lambda: StudyFolder.open(config)) as folder:
        return train_study(config, folder, console=console, profile=profile)


def train_study(config: StudyConfig, folder: StudyFolder, *, console: Console, profile: bool = False) -> Path:
    """Runs or resumes a study in its folder, from scans to page."""
    by_first("volumes", lambda: prepare_volumes(config, folder, console=console))
    split = load_split(config, read_index(folder.path / "volumes"))
    hospitals = sorted({patient.hospital for patient in split.train})
    roster = folder.seat(hospitals, places=config.places)
    console.print(
        f"[bold]{len(split.train)}[/] patients to train on, [bold]{len(split.validation)}[/] to validate, "
        f"[bold]{len(split.test)}[/] never trained on, in {len(hospitals)} hospitals"
    )
    runs = plan_runs(config, folder.path, split, roster=roster)
    runs[0] = replace(runs[0], profile=profile)
    check_before_training(config, split, runs)
    for caution in dict.fromkeys(plan_of_run(run, split).caution() for run in runs):
        if caution:
            console.print(f"[yellow]warning[/] {caution}", highlight=False, soft_wrap=True)
    with folder.stage("controls"):
        controls = evaluation.score_controls(split, config) if is_first() else None
    rounds = {
        name: stage.rounds
        for name in ("segmentation", "classification")
        if (stage := getattr(config, name)) is not None
    }
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
            if arm.partition == "local":
                members = {run.hospitals[0]: read_results(run) for run in runs if run.arm == arm}
                write_json(folder.path / arm.name / "results.json", evaluation.average_members(members))
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
        ingest(
            source,
            folder.path / "volumes",
            config=config.data.volumes,
            root=Path(config.data.root) if config.data.root else None,
            on_error=config.data.on_error,
        )


def load_split(config: StudyConfig, entries: Sequence[IndexEntry]) -> Split:
    """Reads the volumes and splits patients, never slices; scans without mask and label wait for `capsfl predict`."""
    patients = [load_patient(entry, field=config.data.field) for entry in entries]
    known = [patient for patient in patients if patient.truth is not None or patient.label is not None]
    return split_patients(known, config.data, seed=config.seed)


def plan_runs(config: StudyConfig, study: Path, split: Split, *, roster: Sequence[str] = ()) -> list["Run"]:
    """Lists the trainings of a study: one per arm, or for `local` one per hospital.

    Args:
        config: the whole configuration.
        study: the study's folder.
        split: the patients.
        roster: who has, or once had, the places of the study, where hospitals join and leave.
    """
    hospitals = tuple(sorted({patient.hospital for patient in split.train}))
    runs = []
    for arm in config.arms:
        for member in hospitals if arm.partition == "local" else (None,):
            place = f"{arm.name}/{member}" if member else arm.name
            holders = (member,) if member else hospitals
            run = Run(study / place, config.arm(arm), arm, holders, chain_of(config, place), member)
            if config.places is not None and arm.partition == "hospitals":
                run = replace(run, places=vacant_names(roster, config.places))
            runs.append(run)
    return runs


def check_before_training(config: StudyConfig, split: Split, runs: Sequence["Run"]) -> None:
    """Refuses what could not be trained or scored, before any time goes into it.

    Raises:
        ValueError: a hospital without training records for a stage, nothing to score it on, a privacy section that
            contradicts itself or the number of hospitals, or a budget spent before the last stage begins.
    """
    needs = {"segmentation": ("mask", lambda patient: patient.truth is not None)}
    if config.classification is not None:
        needs["classification"] = ("label", lambda patient: patient.label is not None)
    for stage, (column, has) in needs.items():
        for hospital in sorted({patient.hospital for patient in split.train}):
            if not any(has(patient) for patient in split.train if patient.hospital == hospital):
                raise ValueError(
                    f"data.source: {hospital} has no training patient with a {column}, which {stage} needs; fill in "
                    f"the manifest's {column} column or leave the hospital out"
                )
        if not any(has(patient) for patient in split.test):
            raise ValueError(
                f"data.source: no test patient has a {column}, so {stage} cannot be scored; fill in the manifest's "
                f"{column} column or hold out other patients"
            )
    for run in runs:
        plan = plan_of_run(run, split)
        target = run.config.privacy.target_epsilon
        if target is None:
            continue
        allowed, spent = plan.max_rounds(target), 0
        for stage in needs:
            if allowed <= spent:
                raise ValueError(
                    f"privacy.target_epsilon = {target}: spent after {allowed} rounds, before {stage} of {run.place} "
                    "begins; raise it, add noise, or give the stages before fewer rounds"
                )
            spent += getattr(run.config, stage).rounds


def train_runs(runs: Sequence["Run"], volumes: Path, split: Split, controls: evaluation.Controls | None) -> None:
    """Trains runs side by side on a CPU, whose cores one small network does not fill; else one after the other.

    Of several processes each takes part in every run, so that they are all at the same one.
    """
    jobs = min(runs[0].config.jobs or default_jobs(runs[0].config), len(runs))
    if jax.process_count() > 1:
        jobs = 1
    if jobs == 1:
        for run in runs:
            train_run(run, split, controls)
        return
    # "spawn", since a forked JAX deadlocks; the workers read the volumes again rather than have them pickled.
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=die_with_parent) as pool:
        futures = [pool.submit(train_in_worker, run, volumes, controls) for run in runs]
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


def train_in_worker(run: "Run", volumes: Path, controls: evaluation.Controls | None) -> None:
    """`train_run` in a process of its own."""
    train_run(run, load_split(run.config, read_index(volumes)), controls)


@dataclass(frozen=True)
class Run:
    """One training: its folder, its own configuration, and the hospitals whose records it sees."""

    folder: Path
    config: StudyConfig
    arm: ArmConfig
    hospitals: tuple[str, ...]
    chain_id: str
    member: str | None = None
    places: tuple[str, ...] = ()
    profile: bool = False

    @property
    def place(self) -> str:
        """The run's folder within the study: `arm`, or `arm/hospital`."""
        return f"{self.arm.name}/{self.member}" if self.member else self.arm.name

    @property
    def holders(self) -> tuple[str, ...]:
        """Who holds records in this run: the hospitals, or the pool."""
        return ("pooled",) if self.arm.partition == "pooled" else self.hospitals

    @property
    def protects_patients(self) -> bool:
        """Whether the unit of privacy is the patient, so that every record has to say whose it is."""
        return self.config.privacy.unit == "patient"

    def arrange(self, records: Mapping[str, Any], task: str) -> HospitalSource:
        """Stacks this run's share of all hospitals' records, and where asked for moves them to disk."""
        hospitals = select_hospitals(stack_hospitals(records), self.hospitals)
        hospitals = pool_hospitals(hospitals) if self.arm.partition == "pooled" else hospitals
        hospitals = number_patients(hospitals) if self.protects_patients else hospitals
        hospitals = seat_hospitals(hospitals, self.places) if self.places else hospitals
        if self.config.data.residence == "memory" or self.arm.partition != "hospitals":
            return hospitals
        place = self.folder / RECORDS / task
        by_first("the records on disk", lambda: rewrite_hospitals_store(place, hospitals))
        return open_hospitals_store(place)


def plan_of_run(run: Run, split: Split) -> PrivacyPlan:
    """Returns the privacy plan of a run through all its stages.

    Raises:
        PrivacyError: the privacy section contradicts itself, the number of hospitals or that of their patients.
    """
    learns = {"segmentation": lambda patient: patient.truth is not None}
    if run.config.classification is not None:
        learns["classification"] = lambda patient: patient.label is not None
    stages = []
    for task, takes in learns.items():
        counts = dict.fromkeys(run.holders, 0)
        for patient in split.train:
            if patient.hospital in run.hospitals and takes(patient):
                counts["pooled" if run.arm.partition == "pooled" else patient.hospital] += 1
        stage = getattr(run.config, task)
        patients = tuple(counts.items()) if run.protects_patients else ()
        stages.append(Stage(task, stage.rounds, stage.local.epochs, patients))
    return PrivacyPlan.build(run.config.privacy, num_hospitals=len(run.places or run.holders), stages=stages)


def train_run(run: Run, split: Split, controls: evaluation.Controls | None) -> None:
    """Trains one run through its stages and scores it on the patients never trained on.

    A finished run is left as it is; an unfinished one goes on from its last checkpoint. Of several processes the first
    keeps ledger, curves and results, and alone needs the controls.
    """
    if by_first(run.place, lambda: (run.folder / "results.json").exists()):
        return
    config, marking = run.config, run.config.segmentation
    assert marking is not None  # StudyConfig has it in front of classification
    plan = plan_of_run(run, split)
    with open_ledger(run, split) if is_first() else nullcontext() as ledger:
        metrics = MetricsLog(run.folder / "metrics.jsonl", member=run.member)
        trace = RoundTrace(trace_folder(run.folder) if run.profile else None)
        seg_task = make_segmentation_task(marking, seed=config.seed)

        def patches(patients: Sequence[Patient]) -> dict[str, Any]:
            return by_hospital(
                (p for p in patients if p.truth is not None),
                lambda p: cut_patches(p, marking, seed=evaluation.seed_of(config.seed, p.key)),
                numbered=run.protects_patients,
            )

        seg_state, rounds_before = run_rounds(
            run, seg_task, marking, patches(split.train), patches(split.validation),
            ledger, metrics, trace, plan=plan, rounds_before=0,
        )  # fmt: skip
        segmenter = Segmenter(seg_task, marking)
        scans = evaluation.Segmented(segmenter, on_one_device(seg_state.parameters))
        classified = None
        if config.classification is not None:
            stage = config.classification
            cls_task = make_classification_task(stage, seed=config.seed + 1)

            def slices(patients: Sequence[Patient]) -> dict[str, Any]:
                def of_patient(patient: Patient) -> dict[str, np.ndarray]:
                    image = masked_slices(patient.hu, scans.fused(patient), stage)
                    return {"image": image, "label": np.full(len(image), patient.label, np.int32)}

                labelled = (p for p in patients if p.label is not None)
                return by_hospital(labelled, of_patient, numbered=run.protects_patients)

            trained = [p for p in split.train if p.hospital in run.hospitals]
            cls_state, rounds_before = run_rounds(
                run, cls_task, stage, slices(trained), slices(split.validation),
                ledger, metrics, trace, plan=plan, rounds_before=rounds_before,
            )  # fmt: skip
            classified = Classifier(cls_task, stage), on_one_device(cls_state.parameters)

        def score() -> None:
            assert controls is not None
            scores = None if classified is None else evaluation.score_patients(*classified, scans, split)
            results = evaluation.results(split, scans, scores, controls, config, plan.statement(rounds_before))
            evaluation.write_overlays(run.folder, split, scans, results)
            findings = audit_run(run.folder, config, chain_id=run.chain_id)
            for finding in findings:
                if finding.status is Status.FAILED:
                    where = " ".join(str(w) for w in (finding.task, finding.round, finding.leaf) if w is not None)
                    raise ValueError(f"{run.folder}: {finding.check} {where}: {finding.detail}; see `capsfl verify`")
            assert ledger is not None
            write_json(run.folder / "ledger.json", ledger_summary(ledger, findings))
            shutil.rmtree(run.folder / RECORDS, ignore_errors=True)  # patients' images: no longer than needed
            write_json(run.folder / "results.json", results)

        by_first(f"the results of {run.place}", score)


def read_results(run: Run) -> dict[str, Any]:
    """What a finished run scored."""
    return json.loads((run.folder / "results.json").read_text(encoding="utf-8"))


def run_rounds(
    run: Run,
    task: Task,
    stage: RoundsConfig,
    records: Mapping[str, Any],
    validation: Mapping[str, Any],
    ledger: Ledger | None,
    metrics: "MetricsLog",
    trace: RoundTrace,
    *,
    plan: PrivacyPlan,
    rounds_before: int,
) -> tuple[RoundState, int]:
    """Runs the rounds of one stage, each followed by a signed record and a checkpoint.

    All processes run the rounds and save the checkpoints; the ledger's keeper alone scores and records them.

    Returns:
        The last state and how many rounds the run has spent privacy on so far.
    """
    config = run.config
    federation = Federation(
        task,
        run.arrange(records, task.name),
        config=stage,
        privacy=config.privacy,
        devices=recall_chunk(run.folder, task.name, config.devices),
        seed=config.seed,
        stream=run.chain_id if draws_noise(config.privacy) else run.place,
        secret=in_turn("the secret of the noise", lambda: open_run_secret(run)),
        plan=plan,
    )
    del records  # those on disk need not stay in memory
    held_out = stack_hospitals(validation) if validation else None
    total = stage.rounds
    if config.privacy.target_epsilon is not None:
        total = min(total, plan.max_rounds(config.privacy.target_epsilon) - rounds_before)
    state = federation.init()
    with open_checkpoints(run.folder / "checkpoints" / task.name, keep=config.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore(state, key=federation.fingerprint)
        if restored is not None:
            state = federation.place(restored.state)
            if ledger is not None:
                ledger.reconcile(restored.ledger)
                record = ledger.find(task.name, int(state.round))
                check_recorded(record, state.parameters, run.folder / "checkpoints" / task.name / str(int(state.round)))
        if ledger is not None:
            metrics.keep_until(task.name, int(state.round))
        with trace.rounds(task.name, range(int(state.round) + 1, total + 1)) as numbers:
            for _ in numbers:
                watch = Stopwatch()
                with part("train the cohort"):
                    state, report = federation.step(state)
                spent = rounds_before + int(state.round)
                if ledger is not None:
                    record_choice(run.folder, task.name, federation.choice)
                    with part("evaluate"):
                        scores = federation.evaluate(state.parameters, held_out) if held_out else {}
                    with part("record in the ledger"):
                        ledger.append(round_record(run, task, state, report, plan, spent))
                        metrics.append(task.name, report, scores, plan.epsilon(spent), watch)
                with part("save the checkpoint"):
                    checkpoints.save(
                        state,
                        key=federation.fingerprint,
                        accountant=plan.statement(spent).to_json(),
                        ledger=b"-" if ledger is None else ledger.export(),  # Orbax writes what the first process gives
                    )
    return state, rounds_before + int(state.round)


def round_record(
    run: Run, task: Task, state: RoundState, report: RoundReport, plan: PrivacyPlan, spent: int
) -> RoundRecord:
    """What the ledger keeps of a round: digests, cohort and mechanism, and nothing un-noised.

    The clip norm is the one of the round. Where it is the median of the hospitals' norms, nothing is accounted anyway.
    """
    leaves = tensor_leaves(state.parameters)
    privacy, epsilon = run.config.privacy, plan.epsilon(spent)
    losses = () if plan.patients is None else plan.patients.losses(spent)
    moves = privacy.clipping != "fixed"
    return RoundRecord(
        round=report.round,
        task=task.name,
        parameters_digest=parameters_root(leaves),
        leaves=tuple(sorted(leaves.items())),
        cohort=report.cohort,
        sampler=privacy.sampler,
        clip_norm=decimal(report.clip_norm if moves and report.clip_norm is not None else privacy.clip_norm),
        noise_multiplier=decimal(privacy.noise_multiplier),
        expected_cohort=decimal(plan.expected_cohort),
        epsilon=_figure(epsilon),
        delta=decimal(plan.delta),
        configuration_hash=run.config.digest(),
        code_version=version("capsfl"),
        patients=tuple(
            (loss.hospital, dict(plan.stage(task.name).patients)[loss.hospital], _figure(loss.epsilon))
            for loss in sorted(losses, key=lambda loss: loss.hospital)
        )
        or None,
    )


def _figure(epsilon: float | None) -> str | None:
    return None if epsilon is None else decimal(epsilon)


def open_ledger(run: Run, split: Split) -> Ledger:
    """Opens the run's ledger, or founds it: an owner's key, a key per holder of records, their registrations."""
    place, keys = run.folder / "ledger", run.folder / "keys"
    owner = open_key(keys / "owner.pem")

    def register(holder: str) -> Registration:
        signer = open_key(keys / f"holder-{holder}.pem")
        count = sum(holder in ("pooled", patient.hospital) for patient in split.train)
        return Registration(signer.hospital_id(), holder, signer.public_key, "lung CT", count)

    if not Ledger.exists(place):
        registrations = [register(holder) for holder in run.holders]
        return Ledger.create(place, signer=owner, chain_id=run.chain_id, registrations=registrations)
    ledger = Ledger.open(place, signer=owner)
    try:
        if run.places:
            record_members(ledger, run.hospitals, register, run.folder / "checkpoints")
    except BaseException:
        ledger.close()
        raise
    return ledger


def open_run_secret(run: Run) -> bytes | None:
    """Returns the secret that the run's noise is drawn from, made on its first start; None where that is the seed."""
    if run.config.privacy.noise_key == "seed":
        return None
    begun = any(step.name.isdigit() for step in (run.folder / "checkpoints").glob("*/*"))
    return open_secret(run.folder / "keys" / "noise.secret", begun=begun)


def open_key(path: Path) -> Signer:
    """Loads a signing key, or makes it on the run's first start; encrypted where CAPSFL_KEY_PASSPHRASE is set."""
    passphrase = os.environ.get("CAPSFL_KEY_PASSPHRASE", "").encode() or None
    for draft in path.parent.glob(f".{path.name}.*.tmp"):
        draft.unlink(missing_ok=True)  # a secret that a kill left half-way to its name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_key(Signer.generate(), path, passphrase)
    return load_key(path, passphrase)


def by_hospital(patients: Any, records_of: Any, *, numbered: bool = False) -> dict[str, Any]:
    """Concatenates the records of every hospital's patients: `{hospital: pytree of (records, ...)}`.

    Where they are `numbered`, a leaf "patient" tells them apart, across hospitals too.
    """
    found: dict[str, list[Any]] = {}
    for number, patient in enumerate(patients):
        records = records_of(patient)
        if numbered:
            records[PATIENT] = np.full(len(jax.tree.leaves(records)[0]), number, np.int32)
        found.setdefault(patient.hospital, []).append(records)
    return {name: jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows) for name, rows in sorted(found.items())}


class MetricsLog:
    """The run's un-noised curves as JSON lines; for its owner's eyes, never for the ledger."""

    def __init__(self, path: Path, *, member: str | None) -> None:
        self._path = path
        self._member = {} if member is None else {"member": member}

    def keep_until(self, task: str, round_number: int) -> None:
        """Drops the lines of rounds after the one a run resumes from; those rounds will be run again."""
        if not self._path.exists():
            return
        kept = [row for row in read_rounds(self._path) if row["task"] != task or row["round"] <= round_number]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        partial = self._path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self._path)

    def append(
        self,
        task: str,
        report: RoundReport,
        scores: Mapping[str, Mapping[str, float]],
        epsilon: float | None,
        watch: Stopwatch,
    ) -> None:
        """Writes one round."""
        hospitals: dict[str, dict[str, float]] = {name: dict(values) for name, values in scores.items()}
        for name, loss in report.hospital_loss.items():
            hospitals.setdefault(name, {})["loss"] = loss
        row = {
            **self._member,
            "task": task,
            "round": report.round,
            "loss": report.loss,
            "epsilon": epsilon,
            **watch.read(),
            "cohort": list(report.cohort),
            "update_norm": report.update_norm,
            "not_finite": list(report.not_finite),
            "dropped": list(report.dropped),
            **({"spread": report.spread} if report.spread else {}),
            **({"votes": report.votes, "vote_weights": report.vote_weights} if report.votes else {}),
            "hospitals": hospitals,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
