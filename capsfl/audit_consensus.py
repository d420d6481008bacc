"""Whether a run's hospitals signed all that its configuration asks of them: rules, commitments and votes.

A chain holds what it holds: its rules refuse a lie, and cannot know that votes were due which nobody recorded. The
configuration, whose hash every round names, says what was due.
"""

from collections.abc import Iterable, Sequence

from capsfl.config import StudyConfig
from capsfl.consensus import records_ballots, rules_of
from capsfl.ledger.consensus import ConsensusRules
from capsfl.ledger.records import Record, RoundRecord
from capsfl.ledger.rules import Index
from capsfl.ledger.statements import Registration
from capsfl.ledger.verify import Finding, Status


def check_rules(records: Sequence[Record], config: StudyConfig) -> list[Finding]:
    """Tells whether the chain's rules are those that the configuration gives; nothing where neither has any."""
    expected = None if config.consensus is None else rules_of(config.consensus, config.stages)
    stated = next((record for record in records if isinstance(record, ConsensusRules)), None)
    if stated == expected:
        detail = "as configured: who approves, how ballots decide"
        return [] if expected is None else [Finding("rules", Status.OK, detail=detail)]
    detail = f"the chain states {_rules_line(stated)}, the configuration {_rules_line(expected)}"
    return [Finding("rules", Status.FAILED, detail=detail)]


def check_statements(records: Sequence[Record], index: Index, config: StudyConfig) -> list[Finding]:
    """Tells whether every round has the statements that the configuration asks for; nothing where it asks for none.

    These are a commitment of each hospital of the cohort and of nobody else and, where votes are recorded and there is
    somebody to vote, a decision: the chain's rules then ask for its ballots.

    Args:
        records: of the chain, in its order.
        index: of the same records.
        config: the arm's own configuration.
    """
    if config.consensus is None:
        return []
    names = {record.hospital_id: record.name for record in records if isinstance(record, Registration)}
    findings = []
    for record in (record for record in records if isinstance(record, RoundRecord)):
        wrong = _what_is_missing(record, index, config, names)
        if wrong is not None:
            findings.append(Finding("statements", Status.FAILED, record.round, record.task, None, wrong))
    if findings:
        return findings
    return [Finding("statements", Status.OK, detail="each round has the commitments and decisions that were due")]


def _what_is_missing(record: RoundRecord, index: Index, config: StudyConfig, names: dict[str, str]) -> str | None:
    """What a round lacks, or has and should not, in a line; None where it is as configured."""
    place, stage = (record.task, record.round), config.stages.get(record.task)
    cohort = {index.hospitals[name.casefold()] for name in record.cohort}
    committed = index.committed(place)
    if absent := cohort - committed:
        return f"no commitment of {_listed(names[member] for member in absent)}"
    if others := committed - cohort:
        return f"a commitment of {_listed(names[member] for member in others)}, and no place in the cohort"
    if stage is None:
        return None  # the check of the sequence names such a round
    if not records_ballots(config.consensus, stage):
        return "has ballots, which the configuration keeps out of the ledger" if place in index.ballots else None
    if len(cohort) >= 2 and place not in index.decisions:
        return "no ballots and no decision: votes were to be recorded, and nothing says how the models were weighed"
    return None


def _listed(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first


def _rules_line(rules: ConsensusRules | None) -> str:
    if rules is None:
        return "none"
    return " ".join(f"{name}={value}" for name, value in rules.to_canonical().items() if name != "type")
