"""One round's records with every key at hand, as a simulation of several hospitals holds them, and their size.

    commit -> countersign -> vote -> decide -> the round's record; the block's approvals come with `Ledger.append`

In a deployment each statement would arrive from its hospital; nothing below needs more than that.
"""

from collections.abc import Callable, Mapping
from sys import float_info

from capsfl.ledger import canonical
from capsfl.ledger.block import Block
from capsfl.ledger.canonical import MAX_INTEGER, decimal
from capsfl.ledger.consensus import decide, leader_of, quantize
from capsfl.ledger.errors import LedgerError
from capsfl.ledger.keys import Signer
from capsfl.ledger.records import Record, RoundRecord
from capsfl.ledger.rules import Index
from capsfl.ledger.statements import Ballot, Commitment, Decision, commit, nonce_of


def assemble_round(
    record: RoundRecord,
    index: Index,
    height: int,
    *,
    signers: Mapping[str, Signer],
    updates: Mapping[str, str],
    errors: Mapping[str, Mapping[str, float | None]] | None = None,
) -> tuple[Record, ...]:
    """Returns the records of one block: commitments, ballots, the leader's decision and the round.

    Args:
        record: the round.
        index: of the chain so far.
        height: of the block to come.
        signers: `{hospital id: key}` of the members.
        updates: `{hospital id: update digest}` in hex of the cohort.
        errors: `{voter id: {candidate id: mean absolute error}}` (Eq 17), an error None where it is not finite; or
            None where nobody votes.

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
            rows = tuple((candidate, quantize(error)) for candidate, error in sorted(errors[voter].items()))
            ballots.append(Ballot(record.task, record.round, voter, rows, nonce).signed(signers[voter], chain_id))
        leader = leader_of(height, members)
        decision = Decision(record.task, record.round, leader, *decide(index.rules, ballots, sorted(updates)))
        records += [*ballots, decision.signed(signers[leader], chain_id)]
    return (*records, record)


def longest_statements(task: str, *, members: int, cohort: int, ballots: bool) -> int:
    """Returns how many bytes a block of `assemble_round` takes at most, its round's own record aside.

    Every field has its longest value: a block that is no longer than `canonical.MAX_BYTES` can be written.

    Args:
        task: the name of it.
        members: how many may approve the block.
        cohort: hospitals of the round.
        ballots: whether they vote.
    """
    figure, digest, nonce, signature = decimal(float_info.min), "0" * 64, "0" * 32, "0" * 128
    peer, error = "1" * 64, quantize(0.1234)

    def grown(build: Callable[[tuple[tuple[str, str | None], ...]], Record], row: str | None) -> tuple[int, int]:
        """Bytes of a record without rows of an id and a figure, and of each such row."""
        empty, one = (_length(build(rows)) for rows in ((), ((digest, row),)))
        return empty, one - empty + 1

    bare = Block("0" * 64, MAX_INTEGER, digest, digest, digest, (), bytes(64), MAX_INTEGER)
    approval = len(canonical.encode([digest, signature])) + 1
    total = len(bare.encode()) + len('"approvals":[],') + members * approval
    total += cohort * _length(Commitment(task, MAX_INTEGER, digest, digest, nonce, peer, signature, signature))
    if ballots:
        empty, row = grown(lambda rows: Ballot(task, MAX_INTEGER, digest, rows, nonce, signature), error)
        total += cohort * (empty + cohort * row)
        empty, row = grown(lambda rows: Decision(task, MAX_INTEGER, digest, rows, (), signature), figure)
        total += empty + 2 * cohort * row
    return total


def _length(record: Record) -> int:
    """Bytes of a record and the comma after it."""
    return len(canonical.encode(record.to_canonical())) + 1
