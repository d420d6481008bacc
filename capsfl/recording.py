"""What is kept of a round: its record with what the hospitals sign, its curves, its checkpoint and that one's manifest.

Digesting, signing and writing need the processor, training needs the device. So a round is recorded in a thread while
the next one computes, but never two at once: the order on disk is that of a run without the thread, and so is all that
a kill can leave behind.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from capsfl.checkpoint import CheckpointError, Checkpoints, Step, check_recorded
from capsfl.config import StudyConfig
from capsfl.consensus import records_ballots
from capsfl.curves import MetricsLog
from capsfl.digests import file_digests, tensor_leaves, update_digest
from capsfl.federated.federation import RoundReport
from capsfl.federated.round import RoundState
from capsfl.ledger.assembly import assemble_round
from capsfl.ledger.canonical import MAX_BYTES, decimal
from capsfl.ledger.chain import Ledger
from capsfl.ledger.errors import Divergence, LedgerError
from capsfl.ledger.keyfiles import open_key
from capsfl.ledger.keys import Signer
from capsfl.ledger.manifests import Manifest
from capsfl.ledger.records import RoundRecord, parameters_root
from capsfl.ledger.statements import Decision
from capsfl.ledger.storage import read_whole, replace
from capsfl.privacy.plan import PrivacyPlan
from capsfl.profiling import part

WEIGHT_TOLERANCE = 1e-4
"""Between the shares that the round weighed models by, in float32, and those that follow from the ballots."""


@contextmanager
def one_behind(*, threaded: bool = True) -> Iterator[Callable[..., None]]:
    """Yields a function that calls another one in a thread, while its caller goes on to the next round.

    It waits until the call before has ended, and raises what that one raised; so does the end of the body. Where the
    body itself raises, what the last call raised is noted on that error (`BaseException.add_note`) and lost to nobody.

    Args:
        threaded: False has everything done at once, as several processes need it, which must do the same in one order.
    """
    if not threaded:
        yield lambda function, *arguments: function(*arguments)
        return
    before: list[Future[None]] = []

    def call(function: Callable[..., None], *arguments: Any) -> None:
        if before:
            before.pop().result()
        before.append(pool.submit(function, *arguments))

    with ThreadPoolExecutor(1, thread_name_prefix="recording") as pool:
        try:
            yield call
        except BaseException as error:
            if before and (lost := before.pop().exception()) is not None:
                line = " ".join(str(lost).split())
                error.add_note(f"the round before was not recorded: {type(lost).__name__}: {line}")
            raise
        if before:
            before.pop().result()


class HospitalKeys:
    """The keys of a run's hospitals, which a simulation holds all of.

    Args:
        folder: of the key files, `holder-<name>.pem`; hospitals may join and add theirs.
        load: opens one.
    """

    def __init__(self, folder: Path, load: Callable[[Path], Signer]) -> None:
        self._folder, self._load = folder, load
        self._keys: dict[Path, Signer] = {}

    def signers(self) -> dict[str, Signer]:
        """Returns `{hospital id: key}`."""
        for path in sorted(self._folder.glob("holder-*.pem")):
            if path not in self._keys:
                self._keys[path] = self._load(path)
        return {signer.hospital_id(): signer for signer in self._keys.values()}

    def approvers(self) -> list[Signer]:
        """Returns the keys alone, as a ledger asks for them at every block."""
        return list(self.signers().values())


def append_round(
    ledger: Ledger, record: RoundRecord, report: RoundReport, keys: HospitalKeys | None, *, ballots: bool
) -> None:
    """Appends the record of a round and, given their keys, what its hospitals sign of it.

    Args:
        ledger: of the run, open for writing.
        record: of the round.
        report: of the round, with the updates that the hospitals commit to where there are keys.
        keys: of the hospitals; None where the owner signs alone.
        ballots: whether the report's votes become ballots.

    Raises:
        Divergence: another record of the round is there, or the weights in it are not those that the ballots give.
        LedgerError: a rule of the chain forbids something.
    """
    if keys is None:
        ledger.append(record)
        return
    assert report.updates is not None, "the federation was not asked to keep the updates"
    members = {name: ledger.index.hospitals[name.casefold()] for name in report.cohort}
    updates = {members[name]: update_digest(update) for name, update in report.updates.on_host().items()}
    # A round that is recorded already is signed again as it was: who leads it follows from its height.
    height = ledger.height_of(record.task, record.round)
    errors = _errors(report, members, self_report=ledger.index.rules.self_report) if ballots else None
    records = assemble_round(record, ledger.index, height, signers=keys.signers(), updates=updates, errors=errors)
    for decision in records:
        if isinstance(decision, Decision):
            _check_weights(decision, report, members)
    ledger.append(*records)


@dataclass(frozen=True)
class RoundKeeper:
    """Keeps the finished rounds of one stage of a run; without a ledger their checkpoints alone.

    Attributes:
        config: the arm's own configuration.
        task: name of the stage.
        folder: of the run.
        ledger: open for writing; None in every process but the first.
        metrics: the run's curves.
        checkpoints: of the stage.
        plan: of the whole run.
        fingerprint: key data that says which draws the checkpoints belong to.
    """

    config: StudyConfig
    task: str
    folder: Path
    ledger: Ledger | None
    metrics: MetricsLog
    checkpoints: Checkpoints
    plan: PrivacyPlan
    fingerprint: jax.Array

    @cached_property
    def keys(self) -> HospitalKeys | None:
        """The keys of the hospitals, where they sign."""
        return None if self.config.consensus is None else HospitalKeys(self.folder / "keys", open_key)

    def resume(self, state: RoundState) -> RoundState | None:
        """Returns the state of the last round that was kept, on the host, in the shapes of `state`; None before any.

        Raises:
            CheckpointError: it cannot be read, the ledger does not vouch for its weights, or its manifest for the rest.
            Divergence: ledger and checkpoint are not of one history.
        """
        restored = self.checkpoints.restore(state, key=self.fingerprint)
        number = 0 if restored is None else int(restored.state.round)
        if self.ledger is not None:
            if restored is not None:
                self.ledger.reconcile(restored.ledger)
                record = self.ledger.find(self.task, number)
                check_recorded(record, restored.state.parameters, self.checkpoints.folder / str(number))
                if record is not None:
                    self._check_manifest(record, restored.digest)
            self.metrics.keep_until(self.task, number)
        return None if restored is None else restored.state

    def keep(
        self,
        state: RoundState,
        report: RoundReport,
        scores: Mapping[str, Mapping[str, float]],
        figures: Mapping[str, float | int],
        spent: int,
    ) -> None:
        """Keeps a round, on disk in this order: ledger, curves, manifest of what the checkpoint is to hold, checkpoint,
        manifest with its files too.

        Args:
            state: after the round.
            report: of the round.
            scores: on held-out records, by hospital.
            figures: of the clock.
            spent: rounds that the run has spent privacy on.
        """
        record = None
        if self.ledger is not None:
            with part("record in the ledger"):
                record = round_record(self.config, self.task, state.parameters, report, self.plan, spent)
                ballots = records_ballots(self.config.consensus, self.config.stages[self.task])
                append_round(self.ledger, record, report, self.keys, ballots=ballots)
                self.metrics.append(self.task, report, scores, self.plan.epsilon(spent), figures)
        with part("save the checkpoint"):
            step = Step.of(
                state,
                key=self.fingerprint,
                accountant=self.plan.statement(spent).to_json(),
                ledger=b"-" if self.ledger is None else self.ledger.export(),  # Orbax writes what the first one gives
            )
            if record is not None:
                self._write_manifest(record, step.digest, {})
            self.checkpoints.save(step)
            if record is not None:
                self._sign_files(record, step.digest)

    def _check_manifest(self, record: RoundRecord, digest: str) -> None:
        """Refuses a step that does not hold what was signed, and signs its files where a kill came before that.

        Nothing is signed of a step without a manifest: somebody has deleted it, or an older version was killed.
        `verify` calls its files unverifiable.
        """
        assert self.ledger is not None
        place, step = manifest_place(self.folder, self.task, record.round), self.checkpoints.folder / str(record.round)
        if not place.exists():
            return
        try:
            manifest = Manifest.decode(read_whole(place, MAX_BYTES))
            manifest.check(record, self.ledger.head().public_key, self.ledger.index.binding)
        except LedgerError as error:
            raise CheckpointError(f"{place}: {error}; delete {step} to resume from the round before it") from error
        if manifest.contents is None:
            return  # an older version's, which was written with its files
        if manifest.contents != digest:
            raise CheckpointError(
                f"{step}: what it holds beside the weights is not what was signed; delete this folder to resume from "
                "the round before it"
            )
        if not manifest.files:
            self._sign_files(record, digest)

    def _sign_files(self, record: RoundRecord, digest: str) -> None:
        self._write_manifest(record, digest, file_digests(self.checkpoints.folder / str(record.round)))

    def _write_manifest(self, record: RoundRecord, digest: str, files: Mapping[str, str]) -> None:
        assert self.ledger is not None
        place = manifest_place(self.folder, self.task, record.round)
        place.parent.mkdir(parents=True, exist_ok=True)
        replace(place, self.ledger.manifest(record, digest, files).encode())


def round_record(
    config: StudyConfig, task: str, parameters: Any, report: RoundReport, plan: PrivacyPlan, spent: int
) -> RoundRecord:
    """What the ledger keeps of a round: digests, cohort and mechanism, and nothing un-noised.

    The clip norm is the one of the round. Where it is the median of the hospitals' norms, nothing is accounted anyway.
    """
    leaves, privacy = tensor_leaves(parameters), config.privacy
    losses = () if plan.patients is None else plan.patients.losses(spent)
    moves = privacy.clipping != "fixed"
    return RoundRecord(
        round=report.round,
        task=task,
        parameters_digest=parameters_root(leaves),
        leaves=tuple(sorted(leaves.items())),
        cohort=report.cohort,
        sampler=privacy.sampler,
        clip_norm=decimal(report.clip_norm if moves and report.clip_norm is not None else privacy.clip_norm),
        noise_multiplier=decimal(privacy.noise_multiplier),
        expected_cohort=decimal(plan.expected_cohort),
        epsilon=_figure(plan.epsilon(spent)),
        delta=decimal(plan.delta),
        configuration_hash=config.digest(),
        code_version=version("capsfl"),
        patients=tuple(
            (loss.hospital, dict(plan.stage(task).patients)[loss.hospital], _figure(loss.epsilon))
            for loss in sorted(losses, key=lambda loss: loss.hospital)
        )
        or None,
    )


def _figure(epsilon: float | None) -> str | None:
    return None if epsilon is None else decimal(epsilon)


def manifest_place(run: Path, task: str, round_number: int) -> Path:
    """Where the manifest of a round's checkpoint lies."""
    return run / "manifests" / task / f"{round_number}.json"


def _errors(
    report: RoundReport, members: Mapping[str, str], *, self_report: bool
) -> dict[str, dict[str, float | None]] | None:
    """Ballots by id: an error for every model that there was a vote on, None where it was not finite."""
    if len(report.cohort) < 2:
        return None  # nobody to vote
    there = [name for name in report.cohort if name not in report.not_finite]
    return {
        members[voter]: {
            members[name]: report.votes.get(voter, {}).get(name) for name in there if name != voter or self_report
        }
        for voter in report.cohort
    }


def _check_weights(decision: Decision, report: RoundReport, members: Mapping[str, str]) -> None:
    decided = {member: float(weight or 0) for member, weight in decision.weights}
    for name, member in members.items():
        there, here = decided.get(member, 0.0), report.vote_weights.get(name, 0.0)
        if abs(there - here) > WEIGHT_TOLERANCE:
            raise Divergence(
                f"task {decision.task}, round {decision.round}: {name} weighs {here:.6f} in the model, and {there:.6f} "
                "by the ballots"
            )
