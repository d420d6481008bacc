"""What `capsfl verify` recomputes: the ledger's digests from Orbax, its epsilons from the accountant."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from capsfl.audit_consensus import check_rules, check_statements
from capsfl.checkpoint import CheckpointError, read_clip_norm, read_parameters, read_step, tensor_leaves
from capsfl.config import ArmConfig, StudyConfig
from capsfl.digests import file_digests
from capsfl.ledger.canonical import MAX_BYTES, decimal
from capsfl.ledger.chain import Ledger
from capsfl.ledger.errors import LedgerError, VersionError
from capsfl.ledger.history import History
from capsfl.ledger.log import survey
from capsfl.ledger.records import Genesis, Record, RoundRecord
from capsfl.ledger.statements import Decision, Registration, Revocation
from capsfl.ledger.storage import read_whole
from capsfl.ledger.verify import Finding, Status, verify
from capsfl.ledger.witness import read_head
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.patient_plan import PatientLoss, Stage
from capsfl.privacy.plan import PrivacyPlan
from capsfl.recording import manifest_place
from capsfl.study import StudyFolderError, load_study_config, study_hospitals


def run_places(study: Path, config: StudyConfig) -> list[tuple[ArmConfig, str]]:
    """The places of a study's runs in its folder: one per arm, or per hospital the study names."""
    found = []
    for arm in config.arms:
        if arm.has_members:
            found += [(arm, f"{arm.name}/{hospital}") for hospital in study_hospitals(study)]
        else:
            found.append((arm, arm.name))
    return found


def choose_run(study: Path, config: StudyConfig, name: str | None) -> tuple[ArmConfig, str]:
    """One of a study's runs by its place, `arm` or `arm/hospital`; None is the study's own arm, the first.

    Raises:
        StudyFolderError: no run has that name; lists those there are.
    """
    places = run_places(study, config)
    for arm, place in places:
        if name in (None, place):
            return arm, place
    raise StudyFolderError(f"arm = {name}: {study} has {', '.join(place for _, place in places)}")


def chain_of(config: StudyConfig, place: str) -> str:
    """The name of a run's chain, bound to the whole study's configuration and the run's place in it."""
    return hashlib.sha256(f"{config.digest()}/{place}".encode()).hexdigest()[:32]


def audit_run(folder: Path, config: StudyConfig, *, chain_id: str, witness_head: bytes | None = None) -> list[Finding]:
    """Checks a run's whole ledger against its checkpoints, its accountant and its configuration.

    Args:
        folder: the run's folder.
        config: the arm's own configuration, `StudyConfig.arm`.
        chain_id: the name that a ledger in this place must have, `chain_of`.
        witness_head: a signed head that somebody kept; rollback and split views show only against one.
    """
    place = folder / "ledger"
    try:
        # Up to the first damage, as `verify` reads it; `Ledger.open` would give nothing at all.
        history, _, _ = survey(place)
    except LedgerError:
        history = History()  # `verify` says what is wrong with it
    records = [record for block in history.blocks for record in block.records]
    holders = max(1, sum(isinstance(record, Registration) for record in records))
    if config.places is not None and config.arms[0].partition == "hospitals":
        holders = config.places
    rounds = [record for record in records if isinstance(record, RoundRecord)]
    order = [(record.task, record.round) for record in rounds]
    plan, mechanism = None, []
    if rounds:
        try:
            plan = plan_of_records(rounds, config, holders=holders)
            mechanism = check_mechanism(folder, records, plan)
        except PrivacyError as error:
            mechanism = [Finding("mechanism", Status.FAILED, detail=f"the records fit no plan: {error}")]
        except Exception as error:  # hostile records must not stop the auditor
            line = f"{type(error).__name__} {error}".splitlines()[0][:200]
            mechanism = [Finding("mechanism", Status.FAILED, detail=f"the records fit no plan: {line}")]

    def recompute_leaves(record: RoundRecord) -> Mapping[str, str] | None:
        parameters = read_parameters(folder / "checkpoints" / record.task, record.round)
        return None if parameters is None else tensor_leaves(parameters)

    def recompute_epsilon(record: RoundRecord) -> str | None:
        spent = order.index((record.task, record.round)) + 1
        epsilon = None if plan is None else plan.epsilon(spent)
        return None if epsilon is None else decimal(epsilon)

    def recompute_manifest(record: RoundRecord) -> tuple[bytes, Mapping[str, str]] | None:
        manifest, step = manifest_place(folder, record.task, record.round), folder / "checkpoints" / record.task
        if not manifest.exists() or not (step / str(record.round)).is_dir():
            return None
        return read_whole(manifest, MAX_BYTES), file_digests(step / str(record.round))

    def recompute_contents(record: RoundRecord) -> str:
        return read_step(folder / "checkpoints" / record.task, record.round).digest

    findings = verify(
        place,
        recompute_leaves=recompute_leaves,
        recompute_epsilon=recompute_epsilon,
        configuration_hash=config.digest(),
        witness_head=witness_head,
        recompute_manifest=recompute_manifest,
        recompute_contents=recompute_contents,
    )
    consensus = [*check_rules(records, config), *check_statements(records, history.index, config)]
    sequence = check_sequence(records, config)
    place_of = [*_check_identity(records, chain_id), *_check_coverage(folder, order)]
    return [*findings, *mechanism, *consensus, *sequence, *place_of]


def plan_of_records(rounds: Sequence[RoundRecord], config: StudyConfig, *, holders: int) -> PrivacyPlan:
    """Returns the plan that a run's ledger says it followed.

    Args:
        rounds: its records, in the order of the chain; where patients are the unit they say how many there are.
        config: the arm's own configuration.
        holders: registered holders of records.

    Raises:
        PrivacyError: no run of that configuration could have written these records.
    """
    stages = []
    for task in ("segmentation", "classification"):
        stage = getattr(config, task)
        record = next((record for record in rounds if record.task == task), None)
        patients = () if record is None else tuple((name, count) for name, count, _ in record.patients or ())
        if stage is not None and (patients or config.privacy.unit == "hospital"):
            stages.append(Stage(task, stage.rounds, stage.local.epochs, patients))
    return PrivacyPlan.build(config.privacy, num_hospitals=holders, stages=stages)


def check_mechanism(folder: Path, records: Sequence[Record], plan: PrivacyPlan) -> list[Finding]:
    """Tells whether every round names the mechanism of the configuration, at the clip norm it had come to.

    That norm cannot be recomputed where the checkpoint before is gone, nor where it is the median of norms that the
    hospitals keep to themselves.
    """
    config, findings = plan.config, []
    registered = {record.name: record.records for record in records if isinstance(record, Registration)}
    rounds = [record for record in records if isinstance(record, RoundRecord)]
    for spent, record in enumerate(rounds, start=1):
        expected: dict[str, Any] = {
            "sampler": config.sampler,
            "noise_multiplier": decimal(config.noise_multiplier),
            "expected_cohort": decimal(plan.expected_cohort),
            "delta": decimal(plan.delta),
        }
        if config.clipping == "fixed":
            expected["clip_norm"] = decimal(config.clip_norm)
        elif config.clipping == "quantile" and record.round == 1:
            expected["clip_norm"] = decimal(float(np.float32(config.clip_norm)))
        elif config.clipping == "quantile":
            # The state of the round before holds the norm that this round clips to.
            with suppress(CheckpointError):  # reported by the check of its tensors
                before = read_clip_norm(folder / "checkpoints" / record.task, record.round - 1)
                expected |= {} if before is None else {"clip_norm": decimal(before)}
        wrong = next((name for name, value in expected.items() if getattr(record, name) != value), None)
        detail = "as configured"
        if wrong is not None:
            detail = f"{wrong}: recorded {getattr(record, wrong)}, by configuration {expected[wrong]}"
        elif plan.patients is not None:
            wrong, detail = _compare_patients(record, plan.patients.losses(spent), plan, registered)
        status, outside = Status.OK if wrong is None else Status.FAILED, False
        if wrong is None and "clip_norm" not in expected:
            status, outside = Status.UNVERIFIABLE, config.clipping == "median"
            why = "the hospitals keep their norms" if outside else "the checkpoint before, which has it, is gone"
            detail = f"clip_norm: recorded {record.clip_norm}, {why}; the rest {detail}"
        findings.append(Finding("mechanism", status, record.round, record.task, None, detail, outside))
    return findings


def _compare_patients(
    record: RoundRecord, losses: Sequence[PatientLoss], plan: PrivacyPlan, registered: Mapping[str, int]
) -> tuple[str | None, str]:
    """The first hospital whose patients are others than recorded, or lost another epsilon, and a line about it."""
    recorded = {name: epsilon for name, _, epsilon in record.patients or ()}
    counts = {name: count for name, count, _ in record.patients or ()}
    for name, count in plan.stage(record.task).patients:
        if counts.get(name) != count or count > registered.get(name, 0):
            known = f"{count} in the task's first round, {registered.get(name, 0)} registered"
            return name, f"patients of {name}: recorded {counts.get(name)}, {known}"
    for loss in losses:
        found = recorded.get(loss.hospital)
        same = found is None if loss.epsilon is None else found is not None and isclose(float(found), loss.epsilon)
        if not same:
            return loss.hospital, f"epsilon of {loss.hospital}'s patients: recorded {found}, recomputed {loss.epsilon}"
    return None, f"as configured, with the epsilon of the patients of {len(losses)} hospitals"


def check_sequence(records: Sequence[Record], config: StudyConfig) -> list[Finding]:
    """Tells whether the rounds are those that the configuration runs: a round left out would hide what it cost."""
    rounds = [record for record in records if isinstance(record, RoundRecord)]
    done = {"segmentation": 0, "classification": 0}
    wrong: str | None = None
    for record in rounds:
        stage = getattr(config, record.task) if record.task in done else None
        if stage is None:
            wrong = f"{record.task} is no stage of this configuration"
        elif record.round != done[record.task] + 1:
            wrong = f"{record.task} round {record.round} follows round {done[record.task]}"
        elif record.round > stage.rounds:
            wrong = f"{record.task} round {record.round} of {stage.rounds}"
        elif record.task == "classification" and config.segmentation is not None:
            expected = config.segmentation.rounds
            if done["segmentation"] != expected:
                wrong = f"classification begins after {done['segmentation']} of {expected} rounds of segmentation"
        if wrong is not None:
            return [Finding("sequence", Status.FAILED, record.round, record.task, None, wrong)]
        done[record.task] += 1
    begun = next((place for place, record in enumerate(records) if isinstance(record, RoundRecord)), len(records))
    late = [record for record in records[begun:] if isinstance(record, Registration | Revocation)]
    if late and config.places is None:
        detail = f"{len(late)} hospitals registered or revoked after the first round, without `places`"
        return [Finding("sequence", Status.FAILED, detail=detail)]
    return [Finding("sequence", Status.OK, detail=f"{len(rounds)} rounds, none left out")]


def _check_identity(records: Sequence[Record], chain_id: str) -> list[Finding]:
    """Tells whether the ledger is this run's, and not that of another run or study put in its place."""
    found = [record.chain_id for record in records if isinstance(record, Genesis)]
    if found == [chain_id]:
        return [Finding("identity", Status.OK, detail=f"chain {chain_id} belongs to this run")]
    detail = f"the ledger names chain {', '.join(found) or 'none'}, this run's is {chain_id}"
    return [Finding("identity", Status.FAILED, detail=detail)]


def _check_coverage(folder: Path, recorded: Sequence[tuple[str, int]]) -> list[Finding]:
    """Names checkpoints that no record vouches for: rounds whose records were cut off the ledger's end."""
    findings = []
    for task in sorted(path for path in (folder / "checkpoints").glob("*") if path.is_dir()):
        steps = [step.name for step in task.iterdir() if step.name.isascii() and step.name.isdecimal()]
        rounds = sorted(int(step) for step in steps)
        missing = [number for number in rounds if (task.name, number) not in recorded]
        if missing:
            detail = f"checkpoints of rounds {missing} have no record in the ledger"
            findings.append(Finding("coverage", Status.FAILED, missing[0], task.name, None, detail))
        else:
            detail = f"each of {len(rounds)} checkpoints has its record"
            findings.append(Finding("coverage", Status.OK, None, task.name, None, detail))
    return findings


def ledger_summary(ledger: Ledger, findings: list[Finding]) -> dict[str, Any]:
    """What the page draws of a ledger."""
    head = ledger.head()
    blocks = ledger.blocks()
    rows = []
    names = {r.hospital_id: r.name for block in blocks for r in block.records if isinstance(r, Registration)}
    for height, block in enumerate(blocks):
        votes = []
        for decision in block.records:
            if isinstance(decision, Decision):
                weights = dict(decision.weights)
                votes += [
                    {"hospital": names[member], "weight": float(weights[member] or 0) if member in weights else None}
                    for member, _ in decision.errors
                ]
        rows += [
            {
                "height": height,
                "task": record.task,
                "round": record.round,
                "digest": record.parameters_digest,
                "epsilon": None if record.epsilon is None else float(record.epsilon),
                "cohort": list(record.cohort),
                "votes": votes,
                "approvals": len(block.approvals),
                "patients": [
                    {"hospital": name, "patients": count, "epsilon": None if spent is None else float(spent)}
                    for name, count, spent in record.patients or ()
                ],
            }
            for record in block.records
            if isinstance(record, RoundRecord)
        ]
    return {
        "blocks": len(blocks),
        "head": blocks[-1].hash().hex(),
        "root": head.root.hex(),
        "chain_id": head.chain_id,
        "signer": head.public_key.hex(),
        "rounds": rows,
        "findings": [finding_row(finding) for finding in findings],
    }


def finding_row(finding: Finding) -> dict[str, Any]:
    """A finding as JSON values."""
    return {
        "check": finding.check,
        "status": finding.status.name,
        "round": finding.round,
        "task": finding.task,
        "leaf": finding.leaf,
        "detail": finding.detail,
        "outside": finding.outside,
    }


def _is_of_chain(witness_head: bytes | None, folder: Path) -> bool:
    """Tells whether a witness head names the chain of this run; an unreadable one is for `verify` to refuse."""
    if witness_head is None:
        return False
    try:
        with Ledger.open(folder / "ledger") as ledger:
            return read_head(witness_head).chain_id == ledger.head().chain_id
    except LedgerError:
        return True


def _hidden_places(study: Path, config: StudyConfig, runs: Sequence[tuple[ArmConfig, str]]) -> list[str]:
    """Folders of hospitals' own runs that `study.json`, which nobody signs, does not name."""
    listed = {place for _, place in runs}
    shared = [arm.name for arm in config.arms if arm.has_members]
    places = {
        f"{arm}/{part.parent.name}"
        for arm in shared
        for name in ("ledger", "checkpoints")
        for part in (study / arm).glob(f"*/{name}")
    }
    return sorted(places - listed)


def _unlisted(place: str) -> Finding:
    detail = f"{place} holds a run that study.json does not name"
    return Finding("coverage", Status.FAILED, detail=detail)


def _require_ledger(folder: Path, chain_id: str) -> None:
    """Refuses a run that there is nothing to audit in: what another version, or another run, has written.

    Raises:
        LedgerError: no ledger there, or not one to be read here.
    """
    place = folder / "ledger"
    if not (place / "head").exists() and not (place / "log").exists():
        raise LedgerError(f"{place}: no ledger here: name a study whose training has begun, or put the ledger back")
    history, _, fault = survey(place)
    if isinstance(fault, VersionError):
        raise VersionError(f"{place}: {fault}")
    if history.blocks and history.genesis.chain_id != chain_id:
        raise LedgerError(
            f"{place}: holds chain {history.genesis.chain_id}, this run's is {chain_id}: put the run's own ledger "
            "back, or take the version of capsfl that trained it"
        )


def audit_study(study: Path, *, witness_head: bytes | None = None) -> dict[str, list[Finding]]:
    """Checks every run of a study: `{run: findings}`; a witness head is held against the chain it names.

    Raises:
        StudyFolderError: no study there.
        LedgerError: a run of it without a ledger, with that of another one, or with one of another version of capsfl.
    """
    config = load_study_config(study)
    runs = run_places(study, config)
    for _, place in runs:
        _require_ledger(study / place, chain_of(config, place))
    found: dict[str, list[Finding]] = {place: [_unlisted(place)] for place in _hidden_places(study, config, runs)}
    for arm, place in runs:
        folder = study / place
        witness = witness_head if len(runs) == 1 or _is_of_chain(witness_head, folder) else None
        chain_id = chain_of(config, place)
        found[place] = audit_run(folder, config.arm(arm), chain_id=chain_id, witness_head=witness)
    if (
        witness_head is not None
        and len(runs) > 1
        and all(f.status is Status.UNVERIFIABLE for rows in found.values() for f in rows if f.check == "witness")
    ):
        detail = "the witness head is of no chain of this study"
        found[next(iter(found))].append(Finding("witness", Status.FAILED, detail=detail))
    return found
