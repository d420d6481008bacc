"""A study from scans to page; read this file top to bottom and you have seen the whole road.

    phantom / DICOM / NIfTI -> standard volumes, or pictures -> hospitals -> federated rounds (segmentation,
    classification) -> a checkpoint and a signed record per round -> results beside their controls -> one HTML page

A study trains several arms on the same split: federated, with noise, pooled, every hospital alone. An arm is one
run, or one run per hospital; a run owns a folder with checkpoints, ledger, metrics and results.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from capsfl import evaluation
from capsfl.audit import audit_run, chain_of, ledger_summary
from capsfl.checkpoint import open_checkpoints
from capsfl.clock import Stopwatch
from capsfl.config import ArmConfig, StudyConfig
from capsfl.consensus import caution_of_votes, check_block_size, rules_of
from capsfl.ct.ingest import IndexEntry, ingest, read_index
from capsfl.ct.phantom import write_hospitals
from capsfl.curves import MetricsLog
from capsfl.federated.devices import on_one_device
from capsfl.federated.federation import Federation, RoundsConfig, draws_noise
from capsfl.federated.hospitals import (
    HospitalSource,
    pool_hospitals,
    seat_hospitals,
    select_hospitals,
    stack_hospitals,
)
from capsfl.federated.patients import number_patients, records_by_hospital
from capsfl.federated.recorded import recall_chunk, record_choice
from capsfl.federated.store_writer import rewrite_hospitals_store
from capsfl.federated.stored import open_hospitals_store
from capsfl.learning.classification import Classifier, make_classification_task
from capsfl.learning.fusion import FILE as FUSION_FILE
from capsfl.learning.fusion import NO_MASKS, FusionError
from capsfl.learning.patients import Patient, load_patient
from capsfl.learning.segmentation import Segmenter, cut_patches, make_segmentation_task
from capsfl.learning.tasks import Task
from capsfl.ledger.chain import Ledger
from capsfl.ledger.keyfiles import open_key
from capsfl.ledger.keys import chain_binding
from capsfl.ledger.statements import Registration
from capsfl.ledger.verify import Status
from capsfl.membership import record_members, vacant_names
from capsfl.privacy.patient_plan import Stage
from capsfl.privacy.plan import PrivacyPlan
from capsfl.privacy.secret import open_secret
from capsfl.processes import agree, by_first, in_turn, is_first
from capsfl.profiling import RoundTrace, is_traced, part, trace_folder
from capsfl.progress import show_rounds
from capsfl.recording import HospitalKeys, RoundKeeper, one_behind
from capsfl.report.page import build_page
from capsfl.study import Split, StudyFolder, split_patients, write_json
from capsfl.workers import count_cores, die_with_parent

RECORDS = "records"
"""Folder in a run's for the records that lie on disk while it trains."""
NEEDS: Mapping[str, tuple[str, Callable[[Patient], bool]]] = {
    "segmentation": ("mask", lambda patient: patient.truth is not None),
    "classification": ("label", lambda patient: patient.label is not None),
}
"""What a patient must have for a stage: the manifest's column, and whether it is there."""


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
    folder.record(kinds=sorted({"volume" if patient.pictures is None else "pictures" for patient in split.train}))
    console.print(
        f"[bold]{len(split.train)}[/] patients to train on, [bold]{len(split.validation)}[/] to validate, "
        f"[bold]{len(split.test)}[/] never trained on, in {len(hospitals)} hospitals"
    )
    runs = plan_runs(config, folder.path, split, roster=roster)
    runs[0] = replace(runs[0], profile=profile)
    check_before_training(config, split, runs)
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
    return split_patients(known, config.data, seed=config.seed)


def plan_runs(config: StudyConfig, study: Path, split: Split, *, roster: Sequence[str] = ()) -> list["Run"]:
    """Lists the trainings of a study: one per arm, or for `local` and `leave-one-out` one per hospital.

    Args:
        config: the whole configuration.
        study: the study's folder.
        split: the patients.
        roster: who has, or once had, the places of the study, where hospitals join and leave.
    """
    hospitals = tuple(sorted({patient.hospital for patient in split.train}))
    runs = []
    for arm in config.arms:
        for member in hospitals if arm.has_members else (None,):
            place = f"{arm.name}/{member}" if member else arm.name
            holders = (member,) if arm.partition == "local" and member else hospitals
            if arm.partition == "leave-one-out":
                holders = tuple(name for name in hospitals if name != member)
            run = Run(study / place, config.arm(arm), arm, holders, chain_of(config, place), member)
            if config.places is not None and arm.partition == "hospitals":
                run = replace(run, places=vacant_names(roster, config.places))
            runs.append(run)
    return runs


def check_before_training(config: StudyConfig, split: Split, runs: Sequence["Run"]) -> None:
    """Refuses what could not be trained or scored, before any time goes into it.

    Raises:
        ValueError: a hospital without training records for a stage, nothing to score it on, a privacy section that
            contradicts itself or the number of hospitals, a budget spent before the last stage begins, or statements of
            hospitals that no block of the ledger holds.
    """
    for stage in config.stages:
        column, has = NEEDS[stage]
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
    learned = config.segmentation is not None and config.segmentation.fusion == "learned"
    if learned and not any(patient.truth is not None and patient.truth.any() for patient in split.validation):
        raise FusionError(NO_MASKS)
    if config.classification is not None:
        check_labels(config.classification.num_classes, split)
    for run in runs:
        if run.arm.partition == "leave-one-out":
            check_left_out(run, split)
        if run.arm.partition == "local":
            check_alone(run, split)
        plan = plan_of_run(run, split)
        holders = run.places or run.holders
        check_block_size(run.config.consensus, run.config.stages, hospitals=holders, cohort=plan.num_slots)
        target = run.config.privacy.target_epsilon
        if target is None:
            continue
        allowed, spent = plan.max_rounds(target), 0
        for name, stage in run.config.stages.items():
            if allowed <= spent:
                raise ValueError(
                    f"privacy.target_epsilon = {target}: spent after {allowed} rounds, before {name} of {run.place} "
                    "begins; raise it, add noise, or give the stages before fewer rounds"
                )
            spent += stage.rounds


def cautions_of(runs: Sequence["Run"], split: Split) -> tuple[str, ...]:
    """What whoever starts these runs should know beforehand, each once."""
    plans = [(run.config.stages, plan_of_run(run, split)) for run in runs]
    found = [plan.caution() for _, plan in plans]
    found += [caution_of_votes(stages, plan.expected_cohort) for stages, plan in plans]
    if lost := evaluation.outside_field(split.test):
        found.append(f"data.field leaves out {lost:.1%} of what the test patients' masks mark; it counts as missed")
    return tuple(dict.fromkeys(caution for caution in found if caution))


def check_left_out(run: "Run", split: Split) -> None:
    """Refuses to leave out a hospital that nobody else could judge, or that has nobody to be judged.

    Raises:
        ValueError: names the arm, the hospital and what is missing.
    """
    arm, mine = f"arms.partition = leave-one-out ({run.arm.name})", run.share_of(split)
    if not run.hospitals:
        raise ValueError(f"{arm}: {run.member} is the only hospital; name a second one, or leave the arm out")
    for stage in run.config.stages:
        column, has = NEEDS[stage]
        if not any(has(patient) for patient in mine.test):
            raise ValueError(
                f"{arm}: {run.member} has no test patient with a {column}, so nothing would be judged without it; hold "
                "out other patients, or leave the arm out"
            )
    learned = run.config.segmentation is not None and run.config.segmentation.fusion == "learned"
    if learned and not any(patient.truth is not None and patient.truth.any() for patient in mine.validation):
        raise ValueError(
            f'{arm}: without {run.member} no validation patient has a mask, which segmentation.fusion = "learned" '
            "needs; choose another fusion, or hold out other patients"
        )


def check_alone(run: "Run", split: Split) -> None:
    """Refuses a hospital that would have to fit a fusion to masks that it does not hold.

    Without validation patients its classifier decides at 1/2.

    Raises:
        ValueError: names the arm and the hospital.
    """
    learned = run.config.segmentation is not None and run.config.segmentation.fusion == "learned"
    mine = run.share_of(split).validation
    if learned and not any(patient.truth is not None and patient.truth.any() for patient in mine):
        raise ValueError(
            f"arms.partition = local ({run.arm.name}): {run.member} has no validation patient with a mask, which "
            'segmentation.fusion = "learned" needs; choose another fusion, or hold out other patients'
        )


def check_labels(classes: int, split: Split) -> None:
    """Refuses labels that are no class of the network.

    Raises:
        ValueError: names the first patient with such a label.
    """
    for patient in (*split.train, *split.validation, *split.test):
        if patient.label is not None and not 0 <= patient.label < classes:
            raise ValueError(
                f"classification.classes = {classes}: {patient.key} has label {patient.label}, and classes count from "
                f"0; set classification.classes = {patient.label + 1}, or merge classes in the manifest"
            )


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
    """One training: its folder, its own configuration, and the hospitals whose records it sees.

    An arm with a run for every hospital names it by `member`: the hospital that trains alone, or that is left out.
    """

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

    def share_of(self, split: Split) -> Split:
        """Whom this run validates and tests on: everybody, with two exceptions.

        Where a hospital is left out, its test patients alone; nor does it help to choose a threshold or a fusion. A
        hospital that trains alone chooses them by its own validation patients, since it has no others.
        """
        if self.arm.partition == "local":
            return split._replace(validation=tuple(p for p in split.validation if p.hospital in self.hospitals))
        if self.arm.partition != "leave-one-out":
            return split
        return Split(
            tuple(p for p in split.train if p.hospital != self.member),
            tuple(p for p in split.validation if p.hospital != self.member),
            tuple(p for p in split.test if p.hospital == self.member),
        )

    def arrange(self, records: Mapping[str, Any], task: str) -> HospitalSource:
        """Stacks this run's share of all hospitals' records, and where asked for moves them to disk."""
        hospitals = select_hospitals(stack_hospitals(records), self.hospitals)
        hospitals = pool_hospitals(hospitals) if self.arm.partition == "pooled" else hospitals
        hospitals = number_patients(hospitals) if self.protects_patients else hospitals
        hospitals = seat_hospitals(hospitals, self.places) if self.places else hospitals
        if self.config.data.residence == "memory" or not self.arm.federates:
            return hospitals
        place = self.folder / RECORDS / task
        by_first("the records on disk", lambda: rewrite_hospitals_store(place, hospitals))
        return open_hospitals_store(place)


def plan_of_run(run: Run, split: Split) -> PrivacyPlan:
    """Returns the privacy plan of a run through all its stages.

    Raises:
        PrivacyError: the privacy section contradicts itself, the number of hospitals or that of their patients.
    """
    stages = []
    for task, stage in run.config.stages.items():
        _, takes = NEEDS[task]
        people: dict[str, set[tuple[str, str]]] = {holder: set() for holder in run.holders}
        for patient in split.train:
            if patient.hospital in run.hospitals and takes(patient):
                people["pooled" if run.arm.partition == "pooled" else patient.hospital].add(patient.whose)
        patients = tuple((holder, len(own)) for holder, own in people.items()) if run.protects_patients else ()
        stages.append(Stage(task, stage.rounds, stage.local.epochs, patients))
    return PrivacyPlan.build(run.config.privacy, num_hospitals=len(run.places or run.holders), stages=stages)


def train_run(run: Run, split: Split, controls: evaluation.Controls | None) -> None:
    """Trains one run through its stages and scores it on the patients never trained on.

    A finished run is left as it is; an unfinished one goes on from its last checkpoint. Of several processes the first
    keeps ledger, curves and results, and alone needs the controls.
    """
    if by_first(run.place, lambda: (run.folder / "results.json").exists()):
        return
    config, plan, split = run.config, plan_of_run(run, split), run.share_of(split)
    with open_ledger(run, split) if is_first() else nullcontext() as ledger:
        metrics = MetricsLog(run.folder / "metrics.jsonl", member=run.member)
        trace = RoundTrace(trace_folder(run.folder) if run.profile else None)
        rounds, scans, judge = 0, None, None
        trained: dict[str, evaluation.Trained] = {}

        def learn(
            task: Task, stage: RoundsConfig, records_of: Callable[[Patient], dict[str, np.ndarray]]
        ) -> tuple[Any, dict[str, Any]]:
            """The server's weights after the rounds of one stage, and those of hospitals that have their own."""
            nonlocal rounds
            _, takes = NEEDS[task.name]

            def records(patients: Iterable[Patient]) -> dict[str, Any]:
                return records_by_hospital(filter(takes, patients), records_of, numbered=run.protects_patients)

            weights, own, rounds = run_rounds(
                run, task, stage, records(p for p in split.train if p.hospital in run.hospitals),
                records(split.validation), ledger, metrics, trace, plan=plan, rounds_before=rounds,
            )  # fmt: skip
            trained[task.name] = evaluation.Trained(task, weights, own)
            return weights, own

        if (marking := config.segmentation) is not None:
            task = make_segmentation_task(marking, seed=config.seed)
            learned = learn(
                task, marking, lambda p: cut_patches(p, marking, seed=evaluation.seed_of(config.seed, p.key))
            )
            scans = evaluation.Segmented(Segmenter(task, marking), *learned)
            if marking.fusion == "learned":
                fitted = scans.learn_fusion(split.validation, seed=config.seed)
                by_first("the fusion of the planes", lambda: write_json(run.folder / FUSION_FILE, fitted))
        if (looking := config.classification) is not None:
            task = make_classification_task(looking, seed=config.seed + 1)
            images = evaluation.Images(looking, scans)
            learned = learn(task, looking, images.records)
            judge = partial(evaluation.classify, Classifier(task, looking), *learned, images)

        def score() -> None:
            assert controls is not None
            classified = None if judge is None else judge(split, probe=run.member is None)
            results = evaluation.results(split, scans, classified, controls, config, plan.statement(rounds))
            if scans is not None:
                evaluation.write_overlays(run.folder, split, scans, results)
            if run.member is None:
                evaluation.write_interpretation(run.folder, split, trained, scans, config, results)
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
    metrics: MetricsLog,
    trace: RoundTrace,
    *,
    plan: PrivacyPlan,
    rounds_before: int,
) -> tuple[Any, dict[str, Any], int]:
    """Runs the rounds of one stage, each followed by a signed record and a checkpoint.

    All processes run the rounds and save the checkpoints; the ledger's keeper alone scores and records them.

    Returns:
        The server's last weights, those of hospitals that have their own (`stage.batch_norm`), and how many rounds the
        run has spent privacy on so far.
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
        keep_updates=config.consensus is not None,
    )
    del records  # those on disk need not stay in memory
    held_out = stack_hospitals(validation) if validation else None
    total = stage.rounds
    if config.privacy.target_epsilon is not None:
        total = min(total, plan.max_rounds(config.privacy.target_epsilon) - rounds_before)
    state = federation.init()
    with (
        open_checkpoints(run.folder / "checkpoints" / task.name, keep=config.keep_checkpoints) as checkpoints,
        one_behind(threaded=jax.process_count() == 1) as behind,
    ):
        keeper = RoundKeeper(config, task.name, run.folder, ledger, metrics, checkpoints, plan, federation.fingerprint)
        if (kept := keeper.resume(state)) is not None:
            state = federation.place(kept)
        with trace.rounds(task.name, range(int(state.round) + 1, total + 1)) as numbers:
            for _ in numbers:
                watch = Stopwatch()
                with part("train the cohort"):
                    state, report = federation.step(state)
                scores = {}
                if ledger is not None:
                    record_choice(run.folder, task.name, federation.choice)
                    with part("evaluate"):
                        scores = federation.evaluate(state, held_out) if held_out else {}
                behind(keeper.keep, state, report, scores, watch.read(), rounds_before + int(state.round))
    own = {} if state.statistics is None else {name: federation.weights_of(state, name) for name in run.holders}
    return on_one_device(state.parameters), on_one_device(own), rounds_before + int(state.round)


def open_ledger(run: Run, split: Split) -> Ledger:
    """Opens the run's ledger, or founds it: an owner's key, a key per holder of records, their registrations."""
    place, keys = run.folder / "ledger", run.folder / "keys"
    owner = open_key(keys / "owner.pem")

    def register(holder: str) -> Registration:
        signer = open_key(keys / f"holder-{holder}.pem")
        count = sum(holder in ("pooled", patient.hospital) for patient in split.train)
        return Registration.of(signer, holder, "lung CT", count, chain_binding(run.chain_id, owner.public_key))

    consensus = run.config.consensus
    approvers = tuple if consensus is None else HospitalKeys(keys, open_key).approvers
    if not Ledger.exists(place):
        registrations = [register(holder) for holder in run.holders]
        rules = None if consensus is None else rules_of(consensus, run.config.stages)
        ledger = Ledger.create(place, signer=owner, chain_id=run.chain_id, registrations=registrations, rules=rules)
        ledger.approvers = approvers
        return ledger
    ledger = Ledger.open(place, signer=owner)
    ledger.approvers = approvers
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
