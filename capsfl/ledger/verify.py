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
    recompute_contents: Callable[[RoundRecord], str] | None = None,
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
        recompute_contents: Gives the digest (hex) of all that the checkpoint of a round holds now; asked for where its
            files are not those of the manifest, or were not signed yet when a crash came.

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
        found: list[Finding | None] = [tensors]
        if recompute_manifest is not None:
            found.append(_check_manifest(record, history, recompute_manifest, recompute_contents, tensors.status))
        found += [_check_epsilon(record, recompute_epsilon), _check_configuration(record, configuration_hash)]
        findings += [finding for finding in found if finding is not None]
    return findings


def _on(record: RoundRecord, check: str, status: Status, detail: str, leaf: str | None = None) -> Finding:
    return Finding(check, status, record.round, record.task, leaf, detail)


def _check_witness(history: History, data: bytes | None) -> Finding:
    if data is None:
        detail = "no witness head given: a rollback or a rewritten chain would not show"
        return Finding("witness", Status.UNVERIFIABLE, detail=detail, outside=True)
    try:
        witness = read_head(data)
    except Exception as error:
        return Finding("witness", Status.FAILED, detail=f"the witness head is unreadable: {_line(error)}")
    fault = extends(history, witness)
    if fault is not None:
        return Finding("witness", Status.FAILED, detail=fault)
    return Finding("witness", Status.OK, detail=f"extends the {witness.size} blocks the witness saw")


def _check_consensus(history: History) -> Iterator[Finding]:
    """Says what the members' signatures are worth; that they hold, `survey` has checked with every rule."""
    index = history.index
    members = len(index.members())
    records = (record for block in history.blocks for record in block.records)
    names = {record.hospital_id: record.name for record in records if isinstance(record, Registration)}
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
        silent = [names[member] for member in sorted(index.committed((task, number))) if member not in voters]
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


def _check_tensors(record: RoundRecord, recompute: Callable[[RoundRecord], Mapping[str, str] | None]) -> Finding:
    recorded = dict(record.leaves)
    try:
        found = recompute(record)
        if found is None:
            return _on(record, "tensors", Status.UNVERIFIABLE, "nothing to recompute from")
        found = dict(found)
        leaf = first_difference(recorded, found)
    except Exception as error:
        return _on(record, "tensors", Status.FAILED, f"cannot be read back: {_line(error)}")
    if leaf is None:
        return _on(record, "tensors", Status.OK, f"as recorded ({len(recorded)})")
    wrong = "recorded but gone" if leaf not in found else "there but not recorded"
    wrong = "not the recorded one" if leaf in found and leaf in recorded else wrong
    return _on(record, "tensors", Status.FAILED, f"tensor {leaf} is {wrong}", leaf)


def _check_manifest(
    record: RoundRecord,
    history: History,
    recompute: Callable[[RoundRecord], tuple[bytes, Mapping[str, str]] | None],
    recompute_contents: Callable[[RoundRecord], str] | None,
    tensors: Status,
) -> Finding | None:
    try:
        given = recompute(record)
        if given is None:
            if tensors is Status.UNVERIFIABLE:
                return None  # there is no checkpoint
            return _on(record, "manifest", Status.UNVERIFIABLE, "no manifest is kept of its files")
        manifest, found = Manifest.decode(given[0]), dict(given[1])
        manifest.check(record, history.genesis.public_key, history.index.binding)
        file = first_difference(dict(manifest.files), found)
        if manifest.files and file is None:
            return _on(record, "manifest", Status.OK, "as written")  # without their number, which Orbax does not repeat
        held = None
        # Whether the model is another is for its tensors to say.
        if tensors is Status.OK and manifest.contents is not None and recompute_contents is not None:
            held = recompute_contents(record) == manifest.contents
    except Exception as error:
        return _on(record, "manifest", Status.FAILED, f"cannot be read back: {_line(error)}")
    if held is False:
        return _on(record, "manifest", Status.FAILED, "what it holds beside the model is not what was signed", file)
    if held and not manifest.files:
        return _on(record, "manifest", Status.OK, "holds what was signed before it was saved")
    agrees = "all that it holds" if held else "every tensor"
    though = f", though {agrees} agrees" if tensors is Status.OK else ""
    return _on(record, "manifest", Status.WARNING, f"file {file} is not as it was written{though}", file)


def _check_epsilon(record: RoundRecord, recompute: Callable[[RoundRecord], str | None]) -> Finding | None:
    try:
        found = recompute(record)
    except Exception as error:
        return _on(record, "epsilon", Status.FAILED, f"cannot be recomputed: {_line(error)}")
    if found is None:
        if record.epsilon is None and float(record.noise_multiplier or 0) == 0:
            return None  # no noise, no claim, nothing to check
        return _on(record, "epsilon", Status.UNVERIFIABLE, f"recorded {record.epsilon}, nothing to recompute it from")
    if not canonical.is_decimal(found):
        return _on(record, "epsilon", Status.FAILED, f"recomputed {str(found)[:40]!r} is not a number")
    if record.epsilon is None:
        return _on(record, "epsilon", Status.FAILED, f"none recorded, recomputed {found}")
    if math.isclose(float(record.epsilon), float(found), rel_tol=_EPSILON_TOLERANCE):
        return _on(record, "epsilon", Status.OK, f"{record.epsilon} as recorded")
    lie = "understated" if float(record.epsilon) < float(found) else "overstated"
    return _on(record, "epsilon", Status.FAILED, f"{lie}: recorded {record.epsilon}, recomputed {found}")


def _check_configuration(record: RoundRecord, configuration_hash: str | None) -> Finding:
    if configuration_hash is None:
        return _on(record, "configuration", Status.UNVERIFIABLE, "no configuration at hand")
    if record.configuration_hash != configuration_hash:
        wrong = f"recorded {record.configuration_hash}, the configuration at hand is {configuration_hash}"
        return _on(record, "configuration", Status.FAILED, wrong)
    return _on(record, "configuration", Status.OK, "as recorded")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, LedgerError) else f"{type(error).__name__}: {text}"
