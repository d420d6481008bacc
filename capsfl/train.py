"""A study from scans to page; read this file top to bottom and you have seen the whole road.

    phantom / DICOM / NIfTI -> standard volumes -> hospitals -> federated rounds (segmentation, classification)
    -> a checkpoint and a signed record per round -> results beside their controls -> one HTML page

A study trains several arms on the same split: federated, with noise, pooled, every hospital alone. An arm is one
run, or one run per hospital; a run owns a folder with checkpoints, ledger, metrics and results.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
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
from capsfl.federated.federation import Federation, RoundReport, RoundsConfig
from capsfl.federated.hospitals import Hospitals, pool_hospitals, select_hospitals, stack_hospitals
from capsfl.federated.round import RoundState
from capsfl.learning.classification import Classifier, make_classification_task, masked_slices
from capsfl.learning.patients import Patient, load_patient
from capsfl.learning.segmentation import Segmenter, cut_patches, make_segmentation_task
from capsfl.learning.tasks import Task
from capsfl.ledger.canonical import decimal
from capsfl.ledger.chain import Ledger
from capsfl.ledger.keys import Signer
from capsfl.ledger.records import Registration, RoundRecord, parameters_root
from capsfl.ledger.verify import Status
from capsfl.privacy.plan import PrivacyPlan
from capsfl.progress import read_rounds, show_rounds
from capsfl.report.page import build_page
from capsfl.study import Split, StudyFolder, split_patients, write_json


def train(config: StudyConfig, *, console: Console) -> Path:
    """Runs or resumes a study.

    Args:
        config: the whole configuration.
        console: where progress goes.

    Returns:
        The page, `out/report.html`.

    Raises:
        ValueError: anything a user can mend, in one line that names the file or field.
    """
    folder = StudyFolder.open(config)
    entries = prepare_volumes(config, folder, console=console)
    split = load_split(config, entries)
    hospitals = sorted({patient.hospital for patient in split.train})
    folder.record(hospitals=hospitals)
    console.print(
        f"[bold]{len(split.train)}[/] patients to train on, [bold]{len(split.validation)}[/] to validate, "
        f"[bold]{len(split.test)}[/] never trained on, in {len(hospitals)} hospitals"
    )
    runs = plan_runs(config, folder.path, split)
    check_before_training(config, split, runs)
    with folder.stage("controls"):
        controls = evaluation.score_controls(split, config)
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
    for arm in config.arms:
        if arm.partition == "local":
            members = {run.hospitals[0]: read_results(run) for run in runs if run.arm == arm}
            write_json(folder.path / arm.name / "results.json", evaluation.average_members(members))
    folder.finish()
    return build_page(folder.path)


def prepare_volumes(config: StudyConfig, folder: StudyFolder, *, console: Console) -> tuple[IndexEntry, ...]:
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
    return read_index(folder.path / "volumes")


def load_split(config: StudyConfig, entries: Sequence[IndexEntry]) -> Split:
    """Reads the volumes and splits patients, never slices; scans without mask and label wait for `capsfl predict`."""
    patients = [load_patient(entry, field=config.data.field) for entry in entries]
    known = [patient for patient in patients if patient.truth is not None or patient.label is not None]
    return split_patients(known, config.data, seed=config.seed)


def plan_runs(config: StudyConfig, study: Path, split: Split) -> list["Run"]:
    """Lists the trainings of a study: one per arm, or for `local` one per hospital."""
    hospitals = tuple(sorted({patient.hospital for patient in split.train}))
    runs = []
    for arm in config.arms:
        for member in hospitals if arm.partition == "local" else (None,):
            place = f"{arm.name}/{member}" if member else arm.name
            holders = (member,) if member else hospitals
            runs.append(Run(study / place, config.arm(arm), arm, holders, chain_of(config, place), member))
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
        plan = PrivacyPlan.build(run.config.privacy, num_hospitals=len(run.holders))
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


def train_runs(runs: Sequence["Run"], volumes: Path, split: Split, controls: evaluation.Controls) -> None:
    """Trains runs side by side on a CPU, whose cores one small network does not fill; else one after the other."""
    jobs = min(runs[0].config.jobs or default_jobs(runs[0].config), len(runs))
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
    return 1 if alone else os.cpu_count() or 1


def die_with_parent() -> None:
    """Ends a worker with its parent, so that a killed study leaves nobody writing in its folder."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def train_in_worker(run: "Run", volumes: Path, controls: evaluation.Controls) -> None:
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

    @property
    def place(self) -> str:
        """The run's folder within the study: `arm`, or `arm/hospital`."""
        return f"{self.arm.name}/{self.member}" if self.member else self.arm.name

    @property
    def holders(self) -> tuple[str, ...]:
        """Who holds records in this run: the hospitals, or the pool."""
        return ("pooled",) if self.arm.partition == "pooled" else self.hospitals

    def arrange(self, records: Mapping[str, Any]) -> Hospitals:
        """Stacks this run's share of all hospitals' records."""
        hospitals = select_hospitals(stack_hospitals(records), self.hospitals)
        return pool_hospitals(hospitals) if self.arm.partition == "pooled" else hospitals


def train_run(run: Run, split: Split, controls: evaluation.Controls) -> None:
    """Trains one run through its stages and scores it on the patients never trained on.

    A finished run is left as it is; an unfinished one goes on from its last checkpoint.
    """
    if (run.folder / "results.json").exists():
        return
    config, marking = run.config, run.config.segmentation
    assert marking is not None  # StudyConfig has it in front of classification
    with open_ledger(run, split) as ledger:
        metrics = MetricsLog(run.folder / "metrics.jsonl", member=run.member)
        seg_task = make_segmentation_task(marking, seed=config.seed)

        def patches(patients: Sequence[Patient]) -> dict[str, Any]:
            return by_hospital(
                (p for p in patients if p.truth is not None),
                lambda p: cut_patches(p, marking, seed=evaluation.seed_of(config.seed, p.key)),
            )

        seg_state, rounds_before = run_rounds(
            run, seg_task, marking, patches(split.train), patches(split.validation),
            ledger, metrics, rounds_before=0,
        )  # fmt: skip
        segmenter = Segmenter(seg_task, marking)
        scans = evaluation.Segmented(segmenter, seg_state.parameters)
        scores = None
        if config.classification is not None:
            stage = config.classification
            cls_task = make_classification_task(stage, seed=config.seed + 1)

            def slices(patients: Sequence[Patient]) -> dict[str, Any]:
                def of_patient(patient: Patient) -> dict[str, np.ndarray]:
                    image = masked_slices(patient.hu, scans.fused(patient), stage)
                    return {"image": image, "label": np.full(len(image), patient.label, np.int32)}

                return by_hospital((p for p in patients if p.label is not None), of_patient)

            trained = [p for p in split.train if p.hospital in run.hospitals]
            cls_state, rounds_before = run_rounds(
                run, cls_task, stage, slices(trained), slices(split.validation),
                ledger, metrics, rounds_before=rounds_before,
            )  # fmt: skip
            classifier = Classifier(cls_task, stage)
            scores = evaluation.score_patients(classifier, cls_state.parameters, scans, split)
        plan = PrivacyPlan.build(config.privacy, num_hospitals=len(run.holders))
        results = evaluation.results(split, scans, scores, controls, config, plan.statement(rounds_before))
        evaluation.write_overlays(run.folder, split, scans, results)
        findings = audit_run(run.folder, config, chain_id=run.chain_id)
        for finding in findings:
            if finding.status is Status.FAILED:
                where = " ".join(str(part) for part in (finding.task, finding.round, finding.leaf) if part is not None)
                raise ValueError(f"{run.folder}: {finding.check} {where}: {finding.detail}; see `capsfl verify`")
        write_json(run.folder / "ledger.json", ledger_summary(ledger, findings))
        write_json(run.folder / "results.json", results)


def read_results(run: Run) -> dict[str, Any]:
    """What a finished run scored."""
    return json.loads((run.folder / "results.json").read_text(encoding="utf-8"))


def run_rounds(
    run: Run,
    task: Task,
    stage: RoundsConfig,
    records: Mapping[str, Any],
    validation: Mapping[str, Any],
    ledger: Ledger,
    metrics: "MetricsLog",
    *,
    rounds_before: int,
) -> tuple[RoundState, int]:
    """Runs the rounds of one stage, each followed by a signed record and a checkpoint.

    Returns:
        The last state and how many rounds the run has spent privacy on so far.
    """
    config = run.config
    federation = Federation(
        task,
        run.arrange(records),
        config=stage,
        privacy=config.privacy,
        devices=config.devices,
        seed=config.seed,
        stream=run.place,
    )
    held_out = stack_hospitals(validation) if validation else None
    total = stage.rounds
    if config.privacy.target_epsilon is not None:
        total = min(total, federation.plan.max_rounds(config.privacy.target_epsilon) - rounds_before)
    state = federation.init()
    with open_checkpoints(run.folder / "checkpoints" / task.name, keep=config.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore(state, key=federation.key)
        if restored is not None:
            state = federation.place(restored.state)
            ledger.reconcile(restored.ledger)
            record = ledger.find(task.name, int(state.round))
            check_recorded(record, state.parameters, run.folder / "checkpoints" / task.name / str(int(state.round)))
        metrics.keep_until(task.name, int(state.round))
        for _ in range(int(state.round), total):
            watch = Stopwatch()
            state, report = federation.step(state)
            scores = federation.evaluate(state.parameters, held_out) if held_out else {}
            spent = rounds_before + int(state.round)
            epsilon = federation.plan.epsilon(spent)
            ledger.append(round_record(run, task, state, report, federation.plan, epsilon))
            metrics.append(task.name, report, scores, epsilon, watch)
            checkpoints.save(
                state,
                key=federation.key,
                accountant=federation.plan.statement(spent).to_json(),
                ledger=ledger.export(),
            )
    return state, rounds_before + int(state.round)


def round_record(
    run: Run, task: Task, state: RoundState, report: RoundReport, plan: PrivacyPlan, epsilon: float | None
) -> RoundRecord:
    """What the ledger keeps of a round: digests, cohort and mechanism, and nothing un-noised."""
    leaves = tensor_leaves(state.parameters)
    privacy = run.config.privacy
    return RoundRecord(
        round=report.round,
        task=task.name,
        parameters_digest=parameters_root(leaves),
        leaves=tuple(sorted(leaves.items())),
        cohort=report.cohort,
        sampler=privacy.sampler,
        clip_norm=decimal(privacy.clip_norm),
        noise_multiplier=decimal(privacy.noise_multiplier),
        expected_cohort=decimal(plan.expected_cohort),
        epsilon=None if epsilon is None else decimal(epsilon),
        delta=decimal(privacy.delta),
        configuration_hash=run.config.digest(),
        code_version=version("capsfl"),
    )


def open_ledger(run: Run, split: Split) -> Ledger:
    """Opens the run's ledger, or founds it: an owner's key, a key per holder of records, their registrations."""
    place, keys = run.folder / "ledger", run.folder / "keys"
    owner = open_key(keys / "owner.pem")
    if Ledger.exists(place):
        return Ledger.open(place, signer=owner)
    registrations = []
    for holder in run.holders:
        signer = open_key(keys / f"holder-{holder}.pem")
        count = sum(holder in ("pooled", patient.hospital) for patient in split.train)
        registrations.append(Registration(signer.hospital_id(), holder, signer.public_key, "lung CT", count))
    return Ledger.create(place, signer=owner, chain_id=run.chain_id, registrations=registrations)


def open_key(path: Path) -> Signer:
    """Loads a signing key, or makes it on the run's first start."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Signer.generate().save(path)
    return Signer.load(path)


def by_hospital(patients: Any, records_of: Any) -> dict[str, Any]:
    """Concatenates the records of every hospital's patients: `{hospital: pytree of (records, ...)}`."""
    found: dict[str, list[Any]] = {}
    for patient in patients:
        found.setdefault(patient.hospital, []).append(records_of(patient))
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
            "hospitals": hospitals,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
