"""Which record may follow which: the rules of a chain, one function per kind of record."""

from collections import ChainMap
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from capsfl.ledger.consensus import ConsensusRules, decide, leader_of
from capsfl.ledger.errors import LedgerError
from capsfl.ledger.keys import chain_binding
from capsfl.ledger.records import Genesis, Record, RoundRecord, record_id
from capsfl.ledger.sharing import AccessPolicy, RetrievalGrant, RetrievalRequest
from capsfl.ledger.statements import (
    Ballot,
    Commitment,
    Decision,
    Registration,
    Revocation,
    Rotation,
    RoundStatement,
    Statement,
)

RoundKey = tuple[str, int]

_FEWEST_MEMBERS = 2  # a commitment needs another one's signature


@dataclass
class Index:
    """What the rules need to know about the records so far; grows with them."""

    heights: MutableMapping[str, int] = field(default_factory=dict)  # record id -> height
    genesis: MutableMapping[str, Any] = field(default_factory=dict)  # "genesis", "rules" -> record
    hospitals: MutableMapping[str, str] = field(default_factory=dict)  # id or case-folded name -> id
    keys: MutableMapping[str, bytes] = field(default_factory=dict)  # id -> its key by now
    used: MutableMapping[bytes, str] = field(default_factory=dict)  # every key there ever was -> id
    revoked: MutableMapping[str, int] = field(default_factory=dict)  # id -> height
    nonces: MutableMapping[tuple[str, str], int] = field(default_factory=dict)  # (id, nonce) -> height
    rounds: MutableMapping[RoundKey, RoundRecord] = field(default_factory=dict)
    latest: MutableMapping[str, int] = field(default_factory=dict)  # task -> its last round
    commitments: MutableMapping[RoundKey, tuple[Commitment, ...]] = field(default_factory=dict)
    ballots: MutableMapping[RoundKey, tuple[Ballot, ...]] = field(default_factory=dict)
    decisions: MutableMapping[RoundKey, Decision] = field(default_factory=dict)
    policies: MutableMapping[tuple[str, str], AccessPolicy] = field(default_factory=dict)  # (owner, category)
    requests: MutableMapping[str, RetrievalRequest] = field(default_factory=dict)  # record id -> request
    grants: MutableMapping[str, RetrievalGrant] = field(default_factory=dict)  # id of the request -> grant

    def overlay(self) -> "Index":
        """Returns a view of this index that takes additions without changing it."""
        return Index(**{item.name: ChainMap({}, getattr(self, item.name)) for item in fields(self)})

    def absorb(self, overlay: "Index") -> None:
        """Takes over what was added to an overlay of this index."""
        for item in fields(self):
            getattr(self, item.name).update(getattr(overlay, item.name).maps[0])

    @property
    def rules(self) -> ConsensusRules:
        """How members decide; where a chain says nothing, its owner decides."""
        return self.genesis.get("rules", ConsensusRules())

    @property
    def binding(self) -> str:
        """What statements sign as their chain: its name and its owner's key, so that no namesake can replay them."""
        genesis = self.genesis["genesis"]
        return chain_binding(genesis.chain_id, genesis.public_key)

    def committed(self, place: RoundKey) -> set[str]:
        """Returns the ids of the hospitals that committed to an update of a round."""
        return {commitment.hospital for commitment in self.commitments.get(place, ())}

    def members(self) -> tuple[str, ...]:
        """Returns the ids of the hospitals that may sign, sorted."""
        return tuple(sorted(member for member in self.keys if member not in self.revoked))


def admit(records: Sequence[Record], index: Index, height: int) -> Index:
    """Returns the index with a block's records in it.

    Raises:
        LedgerError: a rule forbids one of them.
    """
    index = index.overlay()
    if not records:
        raise LedgerError("a block holds at least one record")
    for position, record in enumerate(records):
        if isinstance(record, Genesis) != (height == 0 and position == 0):
            raise LedgerError("a chain begins with a genesis record, and holds no other")
        # Nobody approves the first block, so it says no more than who the members are and how they decide.
        if height == 0 and not isinstance(record, Genesis | ConsensusRules | Registration):
            raise LedgerError(f"{record.type}: the first block holds rules and registrations only")
        if isinstance(record, ConsensusRules) and (height, position) != (0, 1):
            raise LedgerError("rules: a chain states its rules once, right after its genesis record")
        identity = record_id(record)
        if identity in index.heights:
            raise LedgerError(f"this {record.type} record is already in the chain")
        index.heights[identity] = height
        _RULES[type(record)](record, index, height)
    if index.rules.quorum != "owner" and len(index.members()) < _FEWEST_MEMBERS:
        raise LedgerError(f"rules.quorum: {index.rules.quorum} needs at least {_FEWEST_MEMBERS} members at all times")
    return index


def _begin(record: Genesis, index: Index, height: int) -> None:
    index.genesis["genesis"] = record


def _rule(record: ConsensusRules, index: Index, height: int) -> None:
    index.genesis["rules"] = record


def _register(record: Registration, index: Index, height: int) -> None:
    # Ids and names share one table, so that no hospital can pass for another by taking its id as a name.
    for alias in (record.hospital_id, record.name.casefold()):
        if alias in index.hospitals:
            raise LedgerError(f"registration.name: {record.name!r} or its key is already registered")
        index.hospitals[alias] = record.hospital_id
    if not record.is_proven(index.binding):
        raise LedgerError(f"registration.possession: {record.name!r}: not signed by its key on this chain")
    _use_key("registration.public_key", record.hospital_id, record.public_key, index)


def _rotate(record: Rotation, index: Index, height: int) -> None:
    _check_signed(record, index)
    _use_nonce(record.hospital, record.nonce, index, height)
    if not record.is_proven(index.binding):
        raise LedgerError("rotation.possession: not signed by the new key")
    _use_key("rotation.public_key", record.hospital, record.public_key, index)


def _revoke(record: Revocation, index: Index, height: int) -> None:
    _check_member("revocation.hospital", record.hospital, index)
    index.revoked[record.hospital] = height


def _commit(record: Commitment, index: Index, height: int) -> None:
    place = _check_open_round(record, index)
    if place in index.ballots:
        raise LedgerError(f"commitment.round: the vote on round {record.round} has begun")
    _check_signed(record, index)
    _check_member("commitment.peer", record.peer, index)
    if not record.is_countersigned(index.keys[record.peer], index.binding):
        raise LedgerError(f"commitment.countersignature: not that of {record.peer[:8]}")
    _use_nonce(record.hospital, record.nonce, index, height)
    if record.hospital in index.committed(place):
        raise LedgerError(f"commitment.hospital: {record.hospital[:8]} commits twice to round {record.round}")
    index.commitments[place] = (*index.commitments.get(place, ()), record)


def _vote(record: Ballot, index: Index, height: int) -> None:
    place = _check_open_round(record, index)
    _check_signed(record, index)
    _use_nonce(record.hospital, record.nonce, index, height)
    committed = index.committed(place)
    # Else ballots of outsiders would make up for those of the cohort that are left out.
    if record.hospital not in committed:
        raise LedgerError(f"ballot.hospital: {record.hospital[:8]} has not committed to round {record.round}")
    for candidate, _ in record.errors:
        if candidate not in committed:
            raise LedgerError(f"ballot.errors: {candidate[:8]} has not committed to round {record.round}")
        if candidate == record.hospital and not index.rules.self_report:
            raise LedgerError(f"ballot.errors: {candidate[:8]} scores itself, which this chain's rules exclude")
    earlier = index.ballots.get(place, ())
    if place in index.decisions:
        raise LedgerError(f"ballot.round: round {record.round} is decided")
    if any(other.hospital == record.hospital for other in earlier):
        raise LedgerError(f"ballot.hospital: {record.hospital[:8]} votes twice on round {record.round}")
    # Else a model could be spared the votes of some. Two ballots tell: all but two candidates stand in both, and of
    # the two voters each stands in the other's, or in that of a third.
    for other in earlier[:2]:
        if odd := _models(record, but=other) ^ _models(other, but=record):
            raise LedgerError(
                f"ballot.errors: {min(odd)[:8]} is a candidate on some ballots of round {record.round} only: all list "
                "the same models"
            )
    index.ballots[place] = (*earlier, record)


def _decide(record: Decision, index: Index, height: int) -> None:
    place = _check_open_round(record, index)
    _check_signed(record, index)
    leader = leader_of(height, index.members())
    if record.hospital != leader:
        raise LedgerError(f"decision.hospital: {record.hospital[:8]} does not lead block {height}: {leader[:8]} does")
    if place in index.decisions:
        raise LedgerError(f"decision.round: round {record.round} is decided already")
    committed = index.committed(place)
    ballots = index.ballots.get(place, ())
    # Else a leader would choose by whose ballots it leaves out.
    needed = max(1, -(-2 * len(committed) // 3))
    if len(ballots) < needed:
        raise LedgerError(f"decision.round: {len(ballots)} ballots of {len(committed)} models: it takes {needed}")
    if (record.errors, record.weights) != decide(index.rules, ballots, committed):
        raise LedgerError(f"decision.errors: not what the ballots of round {record.round} give")
    index.decisions[place] = record


def _enter_round(record: RoundRecord, index: Index, height: int) -> None:
    members = {_named("round.cohort", name, index): name for name in record.cohort}
    for member, name in members.items():
        if member in index.revoked:
            raise LedgerError(f"round.cohort: {name!r} was revoked in block {index.revoked[member]}")
    if len(members) != len(record.cohort):
        raise LedgerError("round.cohort: a hospital is named twice, by its name and its id")
    place = _check_open_round(record, index)
    if record.patients is not None:
        counted = {_named("round.patients", name, index) for name, _, _ in record.patients}
        if not counted >= members.keys():
            raise LedgerError("round.patients: a hospital of the cohort is missing, and with it what its patients lost")
    # One that was revoked after it had committed is not missed.
    committed = index.committed(place) - index.revoked.keys()
    if (committed or index.rules.quorum != "owner") and committed != members.keys():
        odd = sorted(member[:8] for member in committed ^ members.keys())
        raise LedgerError(f"round.cohort: not those who committed to round {record.round}: {', '.join(odd)}")
    if place in index.ballots and place not in index.decisions:
        raise LedgerError(f"round.round: the ballots of round {record.round} have no decision")
    index.rounds[place] = record
    index.latest[record.task] = record.round


def _models(ballot: Ballot, *, but: Ballot) -> set[str]:
    """The candidates of a ballot that are neither its voter nor another one's."""
    return {candidate for candidate, _ in ballot.errors} - {ballot.hospital, but.hospital}


def _publish(record: AccessPolicy, index: Index, height: int) -> None:
    _check_signed(record, index)
    before = index.policies.get((record.hospital, record.category))
    expected = 0 if before is None else before.version + 1
    if record.version != expected:
        raise LedgerError(f"policy.version: {record.version}: the next version of this policy is {expected}")
    for member in record.allowed:
        _check_member("policy.allowed", member, index)
    index.policies[record.hospital, record.category] = record


def _request(record: RetrievalRequest, index: Index, height: int) -> None:
    _check_signed(record, index)
    _check_member("request.owner", record.owner, index)
    _use_nonce(record.hospital, record.nonce, index, height)
    index.requests[record_id(record)] = record


def _grant(record: RetrievalGrant, index: Index, height: int) -> None:
    _check_signed(record, index)
    request = index.requests.get(record.request)
    if request is None or request.owner != record.hospital:
        raise LedgerError(f"grant.request: {record.request[:8]}: no request to this hospital")
    _check_member("grant.request", request.hospital, index)
    if record.request in index.grants:
        raise LedgerError(f"grant.request: {record.request[:8]} is granted already")
    policy = index.policies.get((record.hospital, request.category))
    if policy is None or policy.version != record.policy_version:
        found = "none" if policy is None else f"version {policy.version}"
        raise LedgerError(f"grant.policy_version: {record.policy_version}: the policy in force is {found}")
    if not policy.allows(request.hospital, height):
        raise LedgerError(f"grant.request: the policy does not allow {request.hospital[:8]} at block {height}")
    index.grants[record.request] = record


def _use_key(where: str, hospital: str, public_key: bytes, index: Index) -> None:
    if public_key in index.used:
        raise LedgerError(f"{where}: a hospital uses this key, or did: generate a new one")
    index.used[public_key] = hospital
    index.keys[hospital] = public_key


def _named(where: str, name: str, index: Index) -> str:
    member = index.hospitals.get(name.casefold())
    if member is None:
        raise LedgerError(f"{where}: {name!r} is not registered: append its Registration first")
    return member


def _check_member(where: str, hospital: str, index: Index) -> None:
    if hospital not in index.keys:
        raise LedgerError(f"{where}: {hospital[:8]} is not registered: append its Registration first")
    if hospital in index.revoked:
        raise LedgerError(f"{where}: {hospital[:8]} was revoked in block {index.revoked[hospital]}")


def _check_signed(record: Statement, index: Index) -> None:
    hospital = record.hospital
    _check_member(f"{record.type}.hospital", hospital, index)
    if not record.is_signed(index.keys[hospital], index.binding):
        raise LedgerError(f"{record.type}.signature: not that of {hospital[:8]} on this chain")


def _check_open_round(record: RoundStatement | RoundRecord, index: Index) -> RoundKey:
    latest = index.latest.get(record.task, -1)
    if record.round <= latest:
        raise LedgerError(f"{record.type}.round: {record.round} of task {record.task!r} comes after round {latest}")
    return record.task, record.round


def _use_nonce(hospital: str, nonce: str, index: Index, height: int) -> None:
    if (hospital, nonce) in index.nonces:
        raise LedgerError(f"nonce {nonce[:8]} of {hospital[:8]} was used in block {index.nonces[hospital, nonce]}")
    index.nonces[hospital, nonce] = height


_RULES: dict[type, Callable[[Any, Index, int], None]] = {
    Genesis: _begin,
    ConsensusRules: _rule,
    Registration: _register,
    Rotation: _rotate,
    Revocation: _revoke,
    Commitment: _commit,
    Ballot: _vote,
    Decision: _decide,
    RoundRecord: _enter_round,
    AccessPolicy: _publish,
    RetrievalRequest: _request,
    RetrievalGrant: _grant,
}
