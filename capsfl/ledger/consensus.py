"""The five steps of the paper's consensus: commit, countersign, lead, vote, approve (Kumar et al. 2020, II.C).

Every function is arithmetic over what the chain holds, so that whoever reads the chain decides the same:

    Eq 17   MAE(m_j) = (1/n) sum_i |y_i - f(x_i)|            an error that one voter measured, in [0, 1]
    Eq 18   MAE(H_j) = gamma MAE(m_j) + (1/|M|) sum_i MAE(m_i)
            w_j = 1 / MAE(H_j), of those that are not out-voted, over their sum

The second term of Eq 18 is the same for every j: gamma scales the ranking and, at 0, ties all. Voters score the
models of others, and of their finite errors the median counts: with fewer than four members one liar decides.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import mean, median
from typing import Annotated, ClassVar

from capsfl.ledger import canonical
from capsfl.ledger.fields import Check, Count, Figure, check_flag, check_number, check_that
from capsfl.ledger.form import Form
from capsfl.ledger.statements import Ballot

Rows = tuple[tuple[str, str | None], ...]

MAX_PROOF_OF_WORK = 24
SAFE_MEMBERS = 4
SMALLEST_ERROR = 1e-6
"""Stands for an error of 0, whose weight would have no end."""


def _choice(*names: str) -> Check:
    return check_that(lambda name: name in names, f"use one of {', '.join(names)}")


_check_work = check_that(
    lambda bits: type(bits) is int and 0 <= bits <= MAX_PROOF_OF_WORK, f"use 0 to {MAX_PROOF_OF_WORK} bits"
)


@dataclass(frozen=True)
class ConsensusRules(Form):
    """How the members of a chain decide; part of its first block and fixed from then on.

    Attributes:
        quorum: Whose approval a block needs: its owner's alone, two thirds of the members, or all of them.
        combine: How the errors that voters give a model become one.
        self_report: Whether a hospital may score its own model, as the paper has it; gameable.
        gamma: Weight of a model's own error in Eq 18, a decimal string.
        margin: How far above the cohort's median error a model may lie before it is out-voted, or None.
        byzantine: f: the f models of the highest error are out-voted, and with fewer than 2 f + 2 of them all are.
        proof_of_work: Leading zero bits that a block's hash must have; 0 for none.
    """

    type: ClassVar[str] = "rules"
    quorum: Annotated[str, _choice("owner", "two_thirds", "all")] = "owner"
    combine: Annotated[str, _choice("median", "mean")] = "median"
    self_report: Annotated[bool, check_flag] = False
    gamma: Annotated[str, check_number] = "1.0"
    margin: Figure = "0.15"
    byzantine: Count = 0
    proof_of_work: Annotated[int, _check_work] = 0


def approvals_needed(rules: ConsensusRules, members: int) -> int:
    """Returns how many members must approve a block: 0, ⌈2n/3⌉ or n."""
    return {"owner": 0, "two_thirds": -(-2 * members // 3), "all": members}[rules.quorum]


def leader_of(height: int, members: Sequence[str]) -> str:
    """Returns the id whose turn it is to lead the block at a height: round-robin over the sorted ids."""
    return sorted(members)[height % len(members)]


def tally(rules: ConsensusRules, ballots: Sequence[Ballot], candidates: Collection[str]) -> dict[str, Fraction | None]:
    """Returns MAE(m_j) of every candidate, exactly: the median or mean of the finite errors that others gave it.

    A model that gave nobody a finite error is wrong throughout, 1; one that nobody could vote on has None.

    Args:
        rules: of the chain.
        ballots: of one round.
        candidates: ids of the hospitals whose models were voted on.
    """
    found: dict[str, list[str | None]] = {candidate: [] for candidate in sorted(candidates)}
    for ballot in ballots:
        for candidate, error in ballot.errors:
            if candidate in found and (rules.self_report or candidate != ballot.hospital):
                found[candidate].append(error)
    combine = median if rules.combine == "median" else mean
    errors = {}
    for candidate, cast in found.items():
        finite = [Fraction(error) for error in cast if error is not None]
        errors[candidate] = Fraction(combine(finite)) if finite else (Fraction(1) if cast else None)
    return errors


def decide(rules: ConsensusRules, ballots: Sequence[Ballot], candidates: Collection[str]) -> tuple[Rows, Rows]:
    """Returns the errors of Eq 18 and the weights of those that are not out-voted, as a `Decision` holds them.

    Out-voted is whose MAE(m_j) is above the median candidate's by more than the margin, or above that of all but the
    `byzantine` worst; equal errors share one fate. Exact fractions decide, so that every reader decides alike.
    """
    errors = tally(rules, ballots, candidates)
    known = {candidate: error for candidate, error in errors.items() if error is not None}
    if not known:
        return tuple((candidate, None) for candidate in errors), ()
    gamma, shared = Fraction(rules.gamma), mean(known.values())
    figures = {candidate: float(gamma * error + shared) for candidate, error in known.items()}
    combined = tuple((c, canonical.decimal(figures[c]) if c in known else None) for c in errors)
    limit = max(known.values()) if rules.margin is None else median(known.values()) + Fraction(rules.margin)
    if rules.byzantine and len(known) < 2 * rules.byzantine + 2:
        return combined, ()
    limit = min(limit, sorted(known.values())[-1 - rules.byzantine])
    inverse = {c: 1 / max(figures[c], SMALLEST_ERROR) for c, error in known.items() if error <= limit}
    total = math.fsum(inverse.values())
    return combined, tuple((candidate, canonical.decimal(share / total)) for candidate, share in inverse.items())


def quantize(error: float | None) -> str | None:
    """Returns an error as ballots hold it: clipped to [0, 1], four decimals; None where it is not finite.

    An exact error would say more about the voter's records than a vote needs to.
    """
    if error is None or not math.isfinite(error):
        return None
    return canonical.decimal(round(min(max(error, 0.0), 1.0), 4))


def has_work(digest: bytes, bits: int) -> bool:
    """Tells whether a hash begins with so many zero bits."""
    return int.from_bytes(digest, "big") >> (len(digest) * 8 - bits) == 0
