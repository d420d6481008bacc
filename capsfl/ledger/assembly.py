"""One round's records with every key at hand, as a simulation of several hospitals holds them.

    commit -> countersign -> vote -> decide -> the round's record; the block's approvals come with `Ledger.append`

In a deployment each statement would arrive from its hospital; nothing below needs more than that.
"""

from collections.abc import Mapping

from capsfl.ledger.consensus import Decision, ballot_of, decide, leader_of
from capsfl.ledger.errors import LedgerError
from capsfl.ledger.keys import Signer
from capsfl.ledger.records import Record, RoundRecord
from capsfl.ledger.rules import Index
from capsfl.ledger.statements import Commitment, commit, nonce_of


def assemble_round(
    record: RoundRecord,
    index: Index,
    height: int,
    *,
    signers: Mapping[str, Signer],
    updates: Mapping[str, str],
    errors: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[Record, ...]:
    """Returns the records of one block: commitments, ballots, the leader's decision and the round.

    Args:
        record: the round.
        index: of the chain so far.
        height: of the block to come.
        signers: `{hospital id: key}` of the members.
        updates: `{hospital id: update digest}` in hex of the cohort.
        errors: `{voter id: {candidate id: mean absolute error}}` (Eq 17), or None where nobody votes.

    Raises:
        LedgerError: a key is missing, or fewer than two members, so that nobody could countersign.
    """
    members = index.members()
    if len(members) < 2:
        raise LedgerError(f"consensus: {len(members)} members: a commitment needs a second one to countersign")
    for member in (*members, *updates):
        if member not in signers:
            raise LedgerError(f"consensus: no key for {member[:8]}: put its key file back")
    chain_id = index.binding
    records: list[Record] = []
    for hospital in sorted(updates):
        digest, nonce, _ = commit(signers[hospital], chain_id, record.task, record.round, updates[hospital])
        peer = members[(members.index(hospital) + 1) % len(members)]
        bare = Commitment(record.task, record.round, hospital, digest, nonce, peer)
        signed = bare.signed(signers[hospital], chain_id)
        records.append(signed.countersigned(signers[peer], chain_id))
    if errors:
        ballots = []
        for voter in sorted(errors):
            nonce = nonce_of(signers[voter], chain_id, "ballot", record.task, record.round)
            ballot = ballot_of(record.task, record.round, voter, errors[voter], nonce)
            ballots.append(ballot.signed(signers[voter], chain_id))
        leader = leader_of(height, members)
        decision = Decision(record.task, record.round, leader, *decide(index.rules, ballots, sorted(updates)))
        records += [*ballots, decision.signed(signers[leader], chain_id)]
    return (*records, record)
