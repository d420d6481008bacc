"""The five steps of the paper's consensus: commit, countersign, lead, vote, approve (Kumar et al. 2020, II.C).

Every function is arithmetic over what the chain holds, so that whoever reads the chain decides the same:

    Eq 17   MAE(m_j) = (1/n) sum_i |y_i - f(x_i)|            an error that one voter measured, in [0, 1]
    Eq 18   MAE(H_j) = gamma MAE(m_j) + (1/|M|) sum_i MAE(m_i)

The second term of Eq 18 is the same for every j: gamma scales the ranking and, at 0, ties all. Voters score the
models of others, and of their finite errors the median counts: with fewer than four members one liar decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, ClassVar, Literal, get_args

from capsfl.ledger import canonical
from capsfl.ledger.fields import check_count, check_digest, check_figure, check_name, require
from capsfl.ledger.statements import Ballot, Statement, check_errors, check_signature

Quorum = Literal["owner", "two_thirds", "all"]
Combine = Literal["median", "mean"]

MAX_PROOF_OF_WORK = 24
SAFE_MEMBERS = 4


@dataclass(frozen=True)
class ConsensusRules:
    """How the members of a chain decide; part of its first block and fixed from then on.

    Attributes:
        quorum: Whose approval a block needs: its owner's alone, two thirds of the members, or all of them.
        combine: How the errors that voters give a model become one.
        self_report: Whether a hospital may score its own model, as the paper has it; gameable.
        gamma: Weight of a model's own error in Eq 18, a decimal string.
        margin: How far above the cohort's median error a model may lie before it is out-voted, a decimal string.
        proof_of_work: Leading zero bits that a block's hash must have; 0 for none.
    """

    type: ClassVar[str] = "rules"
    quorum: str = "owner"
    combine: str = "median"
    self_report: bool = False
    gamma: str = "1.0"
    margin: str = "0.15"
    proof_of_work: int = 0

    def __post_init__(self) -> None:
        for field, choices in (("quorum", get_args(Quorum)), ("combine", get_args(Combine))):
            value = getattr(self, field)
            require(value in choices, f"rules.{field}", value, f"use one of {', '.join(choices)}")
        require(type(self.self_report) is bool, "rules.self_report", self.self_report, "use true or false")
        for field in ("gamma", "margin"):
            check_figure(f"rules.{field}", getattr(self, field))
            require(getattr(self, field) is not None, f"rules.{field}", None, "give a decimal string")
        check_count("rules.proof_of_work", self.proof_of_work)
        fits = self.proof_of_work <= MAX_PROOF_OF_WORK
        require(fits, "rules.proof_of_work", self.proof_of_work, f"use 0 to {MAX_PROOF_OF_WORK} bits")

    def to_canonical(self) -> dict[str, Any]:
        """Returns the record as a canonical object."""
        return {
            "type": self.type,
            "quorum": self.quorum,
            "combine": self.combine,
            "self_report": self.self_report,
            "gamma": self.gamma,
            "margin": self.margin,
            "proof_of_work": self.proof_of_work,
        }


@dataclass(frozen=True)
class Decision(Statement):
    """What the leader of a round concludes from its ballots; everybody recomputes it.

    Attributes:
        task: Name of the task.
        round: Number of the round.
        hospital: Id of the leader.
        errors: Pairs of hospital id and MAE(H_j) of Eq 18 as a decimal string, sorted by id; None without a vote.
        accepted: Ids whose models were not out-voted, sorted.
        signature: r ‖ s of the leader, in hex.
    """

    type: ClassVar[str] = "decision"
    task: str
    round: int
    hospital: str
    errors: tuple[tuple[str, str | None], ...]
    accepted: tuple[str, ...]
    signature: str = ""

    def __post_init__(self) -> None:
        check_name("decision.task", self.task)
        check_count("decision.round", self.round)
        check_digest("decision.hospital", self.hospital)
        require(type(self.errors) is tuple, "decision.errors", self.errors, "give a tuple of (hospital id, error)")
        for pair in self.errors:
            require(type(pair) is tuple and len(pair) == 2, "decision.errors", pair, "give pairs")
            check_digest("decision.errors", pair[0])
            check_figure("decision.errors", pair[1])
        require(type(self.accepted) is tuple, "decision.accepted", self.accepted, "give a tuple of hospital ids")
        for member in self.accepted:
            check_digest("decision.accepted", member)
        check_signature("decision.signature", self.signature)

    def body(self) -> dict[str, Any]:
        """Returns what the leader's signature covers."""
        return {
            "type": self.type,
            "task": self.task,
            "round": self.round,
            "hospital": self.hospital,
            "errors": [list(pair) for pair in self.errors],
            "accepted": list(self.accepted),
        }


def approvals_needed(rules: ConsensusRules, members: int) -> int:
    """Returns how many members must approve a block: 0, ⌈2n/3⌉ or n."""
    return {"owner": 0, "two_thirds": -(-2 * members // 3), "all": members}[rules.quorum]


def leader_of(height: int, members: Sequence[str]) -> str:
    """Returns the id whose turn it is to lead the block at a height: round-robin over the sorted ids."""
    return sorted(members)[height % len(members)]


def tally(rules: ConsensusRules, ballots: Sequence[Ballot], candidates: Sequence[str]) -> dict[str, float | None]:
    """Returns MAE(m_j) of every candidate: the median or mean of the finite errors that others gave it.

    Args:
        rules: of the chain.
        ballots: of one round.
        candidates: ids of the hospitals whose models were voted on.
    """
    found: dict[str, list[float]] = {candidate: [] for candidate in sorted(candidates)}
    for ballot in ballots:
        for candidate, error in ballot.errors:
            if error is not None and candidate in found and (rules.self_report or candidate != ballot.hospital):
                found[candidate].append(float(error))
    combine = median if rules.combine == "median" else fmean
    return {candidate: float(combine(errors)) if errors else None for candidate, errors in found.items()}


def decide(
    rules: ConsensusRules, ballots: Sequence[Ballot], candidates: Sequence[str]
) -> tuple[tuple[tuple[str, str | None], ...], tuple[str, ...]]:
    """Returns the errors of Eq 18 and who is accepted, as a `Decision` holds them.

    A candidate is out-voted when its MAE(m_j) is above the median candidate's by more than the margin, or when
    no voter found a finite error for it.
    """
    errors = tally(rules, ballots, candidates)
    finite = [error for error in errors.values() if error is not None]
    if not finite:
        return tuple((candidate, None) for candidate in errors), ()
    shared, middle = fmean(finite), float(median(finite))
    combined = tuple(
        (candidate, None if error is None else canonical.decimal(float(rules.gamma) * error + shared))
        for candidate, error in errors.items()
    )
    limit = middle + float(rules.margin)
    accepted = tuple(c for c, error in errors.items() if error is not None and error <= limit)
    return combined, accepted


def quantize(error: float) -> str | None:
    """Returns an error as ballots hold it: clipped to [0, 1], four decimals; None where it is not finite.

    An exact error would say more about the voter's records than a vote needs to.
    """
    return canonical.decimal(round(min(max(error, 0.0), 1.0), 4)) if math.isfinite(error) else None


def ballot_of(task: str, round: int, voter: str, errors: Mapping[str, float], nonce: str) -> Ballot:
    """Returns the unsigned ballot of a voter over `{candidate id: mean absolute error}`."""
    rows = tuple((candidate, quantize(errors[candidate])) for candidate in sorted(errors))
    check_errors("ballot.errors", rows)
    return Ballot(task, round, voter, rows, nonce)


def has_work(digest: bytes, bits: int) -> bool:
    """Tells whether a hash begins with so many zero bits."""
    return int.from_bytes(digest, "big") >> (len(digest) * 8 - bits) == 0
