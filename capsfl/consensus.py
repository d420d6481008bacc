"""What the hospitals of a run sign beside the owner of its ledger, as a configuration and as the rules of a chain.

Off unless asked for. In a simulation every key lies in one folder, so that the hospitals' signatures say nothing that
the owner's does not; the server has to hold every update of a cohort at once; and ballots tell of the voters' records,
under no epsilon. Commitments are salted and tell nothing, whatever else is on.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from capsfl.federated.federation import RoundsConfig
from capsfl.ledger.assembly import longest_statements
from capsfl.ledger.canonical import MAX_BYTES, decimal
from capsfl.ledger.consensus import MAX_PROOF_OF_WORK, SAFE_MEMBERS, ConsensusRules
from capsfl.settings import Settings

TENSOR_BYTES = 128 * 1024
"""Of a round's record for the digests of its model's tensors: a thousand of them, under names of 60 letters."""


class ConsensusConfig(Settings):
    """How the hospitals of a run decide together (Kumar et al. 2020, II.C).

    In every round each hospital of the cohort commits to its update, another one countersigns, those who must approve
    the block do. Where models are weighed by votes (`aggregation.rule = "mae_votes"`) the ballots are recorded too, and
    a leader, each in turn, signs the decision and the weights that follow from them. The updates of the whole cohort
    are then kept until they are digested: a model for every hospital of it, on the device and on the host.
    """

    quorum: Literal["owner", "two_thirds", "all"] = "two_thirds"
    """Whose approval a block needs: its owner's alone, that of two thirds of the hospitals, or of all, any of which can
    then stop the run."""
    ballots: bool = True
    """Whether votes are recorded. They tell of the voters' records; without them the weights are the owner's word."""
    proof_of_work: int = Field(default=0, ge=0, le=MAX_PROOF_OF_WORK)
    """Zero bits that a block's hash begins with, as the paper has it. Among hospitals that sign it adds nothing but
    time: about 0.1 s a block at 16 bits, twice as much with every further one."""


def rules_of(consensus: ConsensusConfig, stages: Mapping[str, RoundsConfig]) -> ConsensusRules:
    """Returns the rules that a run's chain states in its first block.

    Raises:
        ValueError: what the hospitals would have to sign contradicts how their updates are combined.
    """
    voting = {}
    for name, stage in stages.items():
        section, place = stage.aggregation, f"{name}.aggregation"
        if section.secure:
            raise ValueError(
                f"{place}.secure = true: hands over sums only, and under [consensus] each hospital commits to its "
                "update, which the simulation has to see; switch secure off, or leave [consensus] out"
            )
        if section.dropout:
            raise ValueError(
                f"{place}.dropout = {section.dropout}: who drops out commits to nothing, and under [consensus] a "
                "round's cohort is who committed; set it to 0, or leave [consensus] out"
            )
        if records_ballots(consensus, stage):
            voting[name] = (section.gamma, section.margin, section.byzantine, section.self_report)
    if len(set(voting.values())) > 1:
        raise ValueError(
            f"{' and '.join(f'{name}.aggregation' for name in voting)}: a chain has one set of rules; give gamma, "
            "margin, byzantine and self_report the same values, or set consensus.ballots = false"
        )
    gamma, margin, byzantine, self_report = next(iter(voting.values()), (1.0, None, 0, False))
    return ConsensusRules(
        quorum=consensus.quorum,
        self_report=self_report,
        gamma=decimal(gamma),
        margin=None if margin is None else decimal(margin),
        byzantine=byzantine,
        proof_of_work=consensus.proof_of_work,
    )


def records_ballots(consensus: ConsensusConfig | None, stage: RoundsConfig) -> bool:
    """Tells whether the votes of a stage's rounds go into the ledger."""
    return consensus is not None and consensus.ballots and stage.aggregation.rule == "mae_votes"


def check_block_size(
    consensus: ConsensusConfig | None, stages: Mapping[str, RoundsConfig], *, hospitals: Sequence[str], cohort: int
) -> None:
    """Refuses rounds whose statements would not fit into a block of the ledger, before the first one is trained.

    Args:
        consensus: what the hospitals sign; nothing to check without it.
        stages: of the run.
        hospitals: names of all its hospitals.
        cohort: the most of them that take part in a round.

    Raises:
        ValueError: names the field, the bytes and the remedy.
    """
    if consensus is None:
        return
    names = len(json.dumps(list(hospitals)))
    record = TENSOR_BYTES + 2 * names + 64 * len(hospitals)  # with a row of patients each
    for name, stage in stages.items():
        for ballots in sorted({False, records_ballots(consensus, stage)}):
            size = record + longest_statements(name, members=len(hospitals), cohort=cohort, ballots=ballots)
            if size <= MAX_BYTES:
                continue
            what = "ballots" if ballots else "commitments and approvals"
            remedy = "set consensus.ballots = false" if ballots else "leave [consensus] out"
            raise ValueError(
                f"{name}.aggregation.rule = {stage.aggregation.rule}: with the {what} of {cohort} of {len(hospitals)} "
                f"hospitals a block of the ledger may take {size / 2**20:.1f} MiB, and it holds "
                f"{MAX_BYTES / 2**20:.0f}; {remedy}, or draw a smaller privacy.cohort"
            )


def caution_of_votes(stages: Mapping[str, RoundsConfig], cohort: float) -> str | None:
    """What whoever lets so few hospitals vote in a round should know; None where enough of them do.

    Args:
        stages: of the run.
        cohort: how many hospitals take part in a round, on average where that is drawn.
    """
    voting = [name for name, stage in stages.items() if stage.aggregation.rule == "mae_votes"]
    if not voting or cohort >= SAFE_MEMBERS:
        return None
    return (
        f"{voting[0]}.aggregation.rule = mae_votes: of {cohort:g} hospitals a round each model is judged by "
        f"{max(cohort - 1, 0):g}, so that one liar decides about any other; {SAFE_MEMBERS} or more withstand one"
    )
