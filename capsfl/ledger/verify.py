"""Walks a ledger backwards: every signature, link and root, and every figure that can be recomputed.

The ledger holds digests; what they are digests of lies elsewhere, so the caller brings the functions that
recompute them. Whatever cannot be recomputed is UNVERIFIABLE, never OK.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from capsfl.ledger import canonical
from capsfl.ledger.consensus import SAFE_MEMBERS
from capsfl.ledger.errors import LedgerError
from capsfl.ledger.history import History, first_difference
from capsfl.ledger.log import survey
from capsfl.ledger.manifests import Manifest
from capsfl.ledger.records import RoundRecord
from capsfl.ledger.statements import Registration
from capsfl.ledger.witness import extends, read_head

# Two builds of one accountant may differ in the last digits; a lie worth telling is larger than this.
_EPSILON_TOLERANCE = 1e-9


class Status(Enum):
    """What came of a check."""

    OK = "OK"
    WARNING = "warning"
    FAILED = "FAILED"
    UNVERIFIABLE = "unverifiable"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was checked: structure, witness, votes, commitments, approvals, tensors, manifest, epsilon or
            configuration.
        status: What came of it.
        round: Number of the round concerned, or None for the ledger as a whole.
        task: Task of that round, or None.
        leaf: Path of the first tensor (or file) that differs, or None.
        detail: One line for a person.
        outside: Whether what the check would take lies with others by design, a witness, a voter or a hospital's salt,
            so that UNVERIFIABLE says nothing against what is there.
    """

    check: str
    status: Status
    round: int | None = None
    task: str | None = None
    leaf: str | None = None
    detail: str = ""
    outside: bool = False

    @property
    def doubtful(self) -> bool:
        """Whether a strict auditor objects: a warning, or what should be verifiable here and is not."""
        return self.status is Status.WARNING or (self.status is Status.UNVERIFIABLE and not self.outside)


def verify(
    folder: Path | str,
    *,
    recompute_leaves: Callable[[RoundRecord], Mapping[str, str] | None],
    recompute_epsilon: Callable[[RoundRecord], str | None],
    configuration_hash: str | None,
    witness_head: bytes | None = None,
    recompute_manifest: Callable[[RoundRecord], tuple[bytes, Mapping[str, str]] | None] | None = None,
) -> list[Finding]:
    """Checks a ledger and everything it says of its rounds; never raises, whatever the files hold.

    A function that returns None says "cannot be recomputed here" (UNVERIFIABLE); one that raises says "is
    there, but broken" (FAILED). Rounds past the first damaged block are not reported on: nothing vouches
    for them.

    Args:
        folder: The ledger's folder.
        recompute_leaves: Gives the leaf hashes (hex, by tensor path) of the model a round left.
        recompute_epsilon: Gives the decimal string of the epsilon up to and including a round.
        configuration_hash: SHA-256 (hex) of the run's configuration, or None when it is not at hand.
        witness_head: The bytes of a head kept outside the folder. Only against such a head can a rollback,
            a rewritten chain or a second version of it show.
        recompute_manifest: Gives the bytes of a round's signed manifest and the SHA-256 (hex, by path) that the files
            of its checkpoint have now, None where there is no manifest. Files that differ though every tensor agrees
            are a WARNING. Without this function files are not looked at.

    Returns:
        The findings: on the whole first, then round by round.
    """
    try:
        history, _, fault = survey(folder)
    except Exception as error:  # a hostile folder must not stop the auditor
        history, fault = History(), LedgerError(_line(error))
    size = len(history.blocks)
    if fault is None:
        detail = f"{size} blocks of chain {history.genesis.chain_id}, all linked and signed"
        findings = [Finding("structure", Status.OK, detail=detail)]
    else:
        findings = [Finding("structure", Status.FAILED, detail=f"{_line(fault)} ({size} blocks before it hold)")]
    findings.append(_check_witness(history, witness_head))
    findings.extend(_check_consensus(history))
    for record in history.rounds.values():
        tensors = _check_tensors(record, recompute_leaves)
        findings.append(tensors)
        if recompute_manifest is not None:
            findings.extend(_check_manifest(record, history, recompute_manifest, tensors.status))
        findings.extend(_check_epsilon(record, recompute_epsilon))
        findings.append(_check_configuration(record, configuration_hash))
    return findings


def _check_witness(history: History, data: bytes | None) -> Finding:
    if data is None:
        return Finding(
            "witness",
            Status.UNVERIFIABLE,
            detail="no witness head given: a rollback or a rewritten chain would not show",
            outside=True,
        )

    def failed(detail: str) -> Finding:
        return Finding("witness", Status.FAILED, detail=detail)

    try:
        witness = read_head(data)
    except Exception as error:
        return failed(f"the witness head is unreadable: {_line(error)}")
    fault = extends(history, witness)
    if fault is not None:
        return failed(fault)
    return Finding("witness", Status.OK, detail=f"extends the {witness.size} blocks the witness saw")


def _check_consensus(history: History) -> Iterator[Finding]:
    """Says what the members' signatures are worth; that they hold, `survey` has checked with every rule."""
    index = history.index
    members = len(index.members())
    names = {record.hospital_id: record.name for record in _registrations(history)}
    for (task, number), decision in index.decisions.items():
        ballots = index.ballots.get((task, number), ())
        out_voted = [names[member] for member, _ in decision.errors if member not in decision.accepted]
        detail = f"{len(ballots)} ballots give this decision and its weights again; "
        detail += f"out-voted: {', '.join(out_voted) or 'nobody'}"
        status = Status.OK
        cast = Counter(model for ballot in ballots for model, error in ballot.errors if error is not None)
        fewest = min((cast[model] for model, error in decision.errors if error is not None), default=SAFE_MEMBERS)
        if fewest < SAFE_MEMBERS - 1:
            status, detail = Status.WARNING, f"{detail}; a model with {fewest} votes, where one false voter decides"
        voters = {ballot.hospital for ballot in ballots}
        committed = (commitment.hospital for commitment in index.commitments.get((task, number), ()))
        silent = [names[member] for member in committed if member not in voters]
        if silent:
            status, detail = Status.WARNING, f"{detail}; no ballot of {', '.join(silent)}"
        yield Finding("votes", status, number, task, None, detail)
    if index.decisions:
        detail = (
            "the errors in the ballots are the voters' word, and that the model was weighed by them is the owner's: "
            "neither can be measured again here"
        )
        yield Finding("votes", Status.UNVERIFIABLE, detail=detail, outside=True)
    if index.commitments:
        count = sum(len(commitments) for commitments in index.commitments.values())
        detail = f"{count} commitments, signed and countersigned; they open with a hospital's salt and update only"
        yield Finding("commitments", Status.UNVERIFIABLE, detail=detail, outside=True)
    if history.blocks and index.rules.quorum == "owner":
        yield Finding("approvals", Status.OK, detail="the owner alone decides: this chain asks for no approvals")
    elif history.blocks:
        fewest = min((len(block.approvals) for block in history.blocks[1:]), default=0)
        detail = (
            f"every block is approved as the rules ask ({index.rules.quorum}); at least {fewest} of {members} signed"
        )
        yield Finding("approvals", Status.OK, detail=detail)


def _registrations(history: History) -> Iterator[Registration]:
    return (record for block in history.blocks for record in block.records if isinstance(record, Registration))


def _check_tensors(record: RoundRecord, recompute: Callable[[RoundRecord], Mapping[str, str] | None]) -> Finding:
    def finding(status: Status, detail: str, leaf: str | None = None) -> Finding:
        return Finding("tensors", status, record.round, record.task, leaf, detail)

    recorded = dict(record.leaves)
    try:
        found = recompute(record)
        if found is None:
            return finding(Status.UNVERIFIABLE, "nothing to recompute from")
        found = dict(found)
        leaf = first_difference(recorded, found)
    except Exception as error:
        return finding(Status.FAILED, f"cannot be read back: {_line(error)}")
    if leaf is None:
        return finding(Status.OK, f"as recorded ({len(recorded)})")
    wrong = "recorded but gone" if leaf not in found else "there but not recorded"
    wrong = "not the recorded one" if leaf in found and leaf in recorded else wrong
    return finding(Status.FAILED, f"tensor {leaf} is {wrong}", leaf)


def _check_manifest(
    record: RoundRecord,
    history: History,
    recompute: Callable[[RoundRecord], tuple[bytes, Mapping[str, str]] | None],
    tensors: Status,
) -> Iterator[Finding]:
    def finding(status: Status, detail: str, file: str | None = None) -> Finding:
        return Finding("manifest", status, record.round, record.task, file, detail)

    try:
        given = recompute(record)
        if given is None:
            if tensors is not Status.UNVERIFIABLE:
                yield finding(Status.UNVERIFIABLE, "no manifest is kept of its files")
            return
        manifest, found = Manifest.decode(given[0]), dict(given[1])
        manifest.check(record, history.genesis.public_key, history.index.binding)
        file = first_difference(dict(manifest.files), found)
    except Exception as error:
        yield finding(Status.FAILED, f"cannot be read back: {_line(error)}")
        return
    if file is None:
        yield finding(Status.OK, "as written")  # without their number, which Orbax does not repeat
    else:
        # Whether the model is another is for its tensors to say.
        though = ", though every tensor agrees" if tensors is Status.OK else ""
        yield finding(Status.WARNING, f"file {file} is not as it was written{though}", file)


def _check_epsilon(record: RoundRecord, recompute: Callable[[RoundRecord], str | None]) -> Iterator[Finding]:
    def finding(status: Status, detail: str) -> Finding:
        return Finding("epsilon", status, record.round, record.task, None, detail)

    try:
        found = recompute(record)
    except Exception as error:
        yield finding(Status.FAILED, f"cannot be recomputed: {_line(error)}")
        return
    if found is None:
        if record.epsilon is not None or float(record.noise_multiplier or 0) > 0:
            yield finding(Status.UNVERIFIABLE, f"recorded {record.epsilon}, nothing to recompute it from")
        return  # no noise, no claim, nothing to check
    if not canonical.is_decimal(found):
        yield finding(Status.FAILED, f"recomputed {str(found)[:40]!r} is not a number")
    elif record.epsilon is None:
        yield finding(Status.FAILED, f"none recorded, recomputed {found}")
    elif math.isclose(float(record.epsilon), float(found), rel_tol=_EPSILON_TOLERANCE):
        yield finding(Status.OK, f"{record.epsilon} as recorded")
    else:
        lie = "understated" if float(record.epsilon) < float(found) else "overstated"
        yield finding(Status.FAILED, f"{lie}: recorded {record.epsilon}, recomputed {found}")


def _check_configuration(record: RoundRecord, configuration_hash: str | None) -> Finding:
    def finding(status: Status, detail: str) -> Finding:
        return Finding("configuration", status, record.round, record.task, None, detail)

    if configuration_hash is None:
        return finding(Status.UNVERIFIABLE, "no configuration at hand")
    if record.configuration_hash != configuration_hash:
        return finding(
            Status.FAILED,
            f"recorded {record.configuration_hash}, the configuration at hand is {configuration_hash}",
        )
    return finding(Status.OK, "as recorded")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, LedgerError) else f"{type(error).__name__}: {text}"
