"""Five hospitals decide together: what a block needs, what a vote can do, and what every lie meets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfl.ledger import (
    Ballot,
    Block,
    Commitment,
    ConsensusRules,
    Decision,
    Finding,
    Genesis,
    Ledger,
    LedgerError,
    RecordError,
    Registration,
    Revocation,
    Rotation,
    RoundRecord,
    SignedHead,
    Signer,
    Status,
    VersionError,
    canonical,
    commit,
    decide,
    leader_of,
    opens,
    record_id,
    tally,
    verify,
)
from capsfl.ledger.assembly import assemble_round, longest_statements
from capsfl.ledger.consensus import approvals_needed, has_work, quantize
from capsfl.ledger.history import History
from capsfl.ledger.keys import chain_binding
from capsfl.ledger.records import from_canonical

CHAIN = "trial-5"
OWNER = Signer((7).to_bytes(32, "big"))
BOUND = chain_binding(CHAIN, OWNER.public_key)
NAMES: tuple[str, ...] = ("ash", "birch", "cedar", "dogwood", "elm")


def _update(name: str, number: int) -> str:
    return sha256(f"{name}/{number}".encode()).hexdigest()


class Hospitals:
    """The keys of five hospitals and of the chain's owner."""

    def __init__(self, count: int = 5) -> None:
        self.owner = OWNER
        keys = [Signer((200 + index).to_bytes(32, "big")) for index in range(count)]
        self.signers = {key.hospital_id(): key for key in keys}
        self.ids = dict(zip(NAMES, self.signers, strict=False))
        self.registrations = self.registered(BOUND)

    def registered(self, chain_id: str) -> list[Registration]:
        """Their registrations on the chain of this binding."""
        return [
            Registration.of(self.signers[member], name, "lung CT", 10, chain_id) for name, member in self.ids.items()
        ]

    def history(self, **rules: object) -> History:
        """A chain of one block, with these rules."""
        stated = ConsensusRules(**({"quorum": "two_thirds"} | rules))  # pyright: ignore[reportArgumentType]
        history = History()
        history.extend(
            history.next_block((Genesis(CHAIN, self.owner.public_key), stated, *self.registrations), self.owner)
        )
        return history

    def propose(
        self, history: History, record: RoundRecord, errors: Mapping[str, Mapping[str, float]] | None = None
    ) -> tuple:
        """The records of a round in which all take part."""
        updates = {self.ids[name]: _update(name, record.round) for name in record.cohort}
        by_id = errors and {self.ids[v]: {self.ids[c]: e for c, e in row.items()} for v, row in errors.items()}
        height = len(history.blocks)
        return assemble_round(record, history.index, height, signers=self.signers, updates=updates, errors=by_id)

    def extend(self, history: History, records: tuple, approvers: int = 5) -> None:
        """Adds a block that so many hospitals approve."""
        history.extend(history.next_block(records, self.owner, list(self.signers.values())[:approvers]))


@pytest.fixture(scope="module")
def five() -> Hospitals:
    return Hospitals()


@pytest.fixture(scope="module")
def round_of(round_record) -> Callable[..., RoundRecord]:
    """A round in which all five take part."""

    def build(number: int = 0, **changes: object) -> RoundRecord:
        return round_record(number, **({"cohort": NAMES} | changes))

    return build


def _measured(bad: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """What each of five voters finds of the others' models: .2, or worse for the bad ones."""
    return {voter: {c: bad.get(c, 0.2) for c in NAMES if c != voter} for voter in NAMES}


def test_a_round_is_committed_countersigned_voted_on_decided_and_approved(five, round_of):
    history = five.history()
    records = five.propose(history, round_of(), _measured({}))
    five.extend(history, records)
    kinds = [type(record) for record in history.blocks[-1].records]
    assert kinds == [Commitment] * 5 + [Ballot] * 5 + [Decision, RoundRecord]
    assert len(history.blocks[-1].approvals) == 5
    assert history.index.decisions["segmentation", 0].accepted == tuple(sorted(five.signers))
    assert all(from_canonical(record.to_canonical()) == record for record in records)


def test_a_block_with_approvals_reads_back_from_disk(five, round_of, tmp_path):
    rules = ConsensusRules(quorum="all", proof_of_work=4)
    with Ledger.create(
        tmp_path / "a", signer=five.owner, chain_id=CHAIN, registrations=five.registrations, rules=rules
    ) as ledger:
        history = ledger._history
        ledger.approvers = five.signers.values
        for number in range(3):
            records = five.propose(history, round_of(number), _measured({}))
            block = ledger.append(*records)
            assert has_work(block.hash(), 4)
            assert ledger.append(*records) == block  # idempotent
        data = ledger.export()
    opened = Ledger.open(tmp_path / "a")
    assert opened.blocks() == ledger.blocks()
    assert Ledger.restore(tmp_path / "b", data, signer=five.owner).head() == opened.head()


@pytest.mark.parametrize(("quorum", "needed"), [("owner", 0), ("two_thirds", 4), ("all", 5)])
def test_a_block_needs_the_approvals_of_its_quorum(five, round_of, quorum, needed):
    history = five.history(quorum=quorum)
    records = five.propose(history, round_of(), _measured({}))
    if needed:
        with pytest.raises(LedgerError, match=rf"approvals: {needed - 1} of 5 members, the rules ask for {needed}"):
            five.extend(history, records, needed - 1)
    assert len(history.blocks) == 1
    five.extend(history, records, needed)
    assert len(history.blocks) == 2


@given(st.integers(1, 60))
def test_two_thirds_is_rounded_up(members):
    rules = ConsensusRules(quorum="two_thirds")
    needed = approvals_needed(rules, members)
    assert 3 * needed >= 2 * members > 3 * (needed - 1)


def test_approvals_of_strangers_of_another_block_twice_or_damaged_are_refused(five, round_of, stranger):
    history = five.history()
    block = history.next_block(
        five.propose(history, round_of(), _measured({})), five.owner, list(five.signers.values())
    )
    other = history.next_block(
        five.propose(history, round_of(), _measured({"elm": 0.5})), five.owner, list(five.signers.values())
    )
    first, *rest = block.approvals
    for approvals, words in (
        ((first, first, *rest[1:]), "one member twice"),
        (tuple(reversed(block.approvals)), "out of order"),
        ((*block.approvals, ("ff" * 32, "00" * 64)), "more than the members"),
        (tuple(sorted((*rest, (stranger.hospital_id(), first[1])))), "not a member"),
        (other.approvals, "not over this block"),
        (((first[0], first[1][:-2]), *rest), r"approvals.*hex"),
        (((first[0], "zz" * 64), *rest), r"approvals.*hex"),
    ):
        with pytest.raises(LedgerError, match=words):
            history.extend(replace(block, approvals=approvals))
    history.extend(block)


def test_poisoned_models_are_out_voted_by_five_and_a_lying_voter_changes_nothing(five, round_of):
    history = five.history()
    errors = _measured({"elm": 0.9})
    errors["elm"] = {c: 1.0 for c in NAMES if c != "elm"}  # the poisoner also calls every other model bad
    five.extend(history, five.propose(history, round_of(), errors))
    decision = history.index.decisions["segmentation", 0]
    assert set(decision.accepted) == {five.ids[name] for name in NAMES[:4]}
    shared = (0.2 * 4 + 0.9) / 5
    assert float(dict(decision.errors)[five.ids["ash"]]) == pytest.approx(0.2 + shared)


def test_of_three_hospitals_one_lying_voter_out_votes_an_honest_model():
    three = NAMES[:3]
    candidates = [f"{index}" * 64 for index in (1, 2, 3)]
    ids = dict(zip(three, candidates, strict=True))
    honest = {voter: {c: 0.2 for c in three if c != voter} for voter in three}
    honest["cedar"]["ash"] = 1.0  # cedar lies about ash alone
    ballots = [
        Ballot("t", 0, ids[voter], tuple(sorted((ids[c], quantize(e)) for c, e in row.items())), "00" * 16)
        for voter, row in honest.items()
    ]
    _, weights = decide(ConsensusRules(), ballots, candidates)
    assert [member for member, _ in weights] == [ids["birch"], ids["cedar"]]  # the median of two is their mean: .6


@given(st.data())
def test_the_tally_is_the_median_of_what_others_found_and_gamma_does_not_change_the_ranking(data):
    candidates = [f"{index:064x}" for index in range(data.draw(st.integers(2, 7)))]
    errors = st.one_of(st.none(), st.floats(0, 1).map(quantize))
    ballots = [
        Ballot("t", 0, voter, tuple((c, data.draw(errors)) for c in candidates), "00" * 16) for voter in candidates
    ]
    for self_report in (False, True):
        rules = ConsensusRules(self_report=self_report, gamma="1.0")
        found = tally(rules, ballots, candidates)
        for candidate in candidates:
            scores = sorted(
                Fraction(error)
                for ballot in ballots
                for c, error in ballot.errors
                if c == candidate and error is not None and (self_report or ballot.hospital != c)
            )
            n = len(scores)
            assert found[candidate] == (1 if not n else (scores[(n - 1) // 2] + scores[n // 2]) / 2)
    ones, _ = decide(ConsensusRules(gamma="1.0"), ballots, candidates)
    threes, weights = decide(ConsensusRules(gamma="3.0"), ballots, candidates)
    zeros, same = decide(ConsensusRules(gamma="0.0"), ballots, candidates)
    assert [member for member, _ in weights] == [member for member, _ in same]
    assert sum(float(str(weight)) for _, weight in weights) == pytest.approx(1)
    assert len({error for _, error in zeros if error is not None}) <= 1

    def ranking(rows):
        return sorted((c for c, e in rows if e is not None), key=lambda c: (float(dict(rows)[c]), c))

    def order(rows):
        return [round(float(dict(rows)[c]), 9) for c in ranking(rows)]

    assert ranking(ones) == ranking(threes) or len(set(order(ones))) < len(order(ones))


def test_the_mean_can_be_moved_by_one_liar_and_the_median_cannot():
    candidates = [f"{index:064x}" for index in range(5)]
    ballots = [
        Ballot(
            "t",
            0,
            v,
            tuple((c, "1.0" if (v, c) == (candidates[4], candidates[0]) else "0.11") for c in candidates if c != v),
            "00" * 16,
        )
        for v in candidates
    ]
    assert float(tally(ConsensusRules(), ballots, candidates)[candidates[0]] or 0) == pytest.approx(0.11)
    assert tally(ConsensusRules(combine="mean"), ballots, candidates)[candidates[0]] == Fraction("0.3325")


def test_a_commitment_opens_with_its_own_salt_and_update_only(five):
    signer = five.signers[five.ids["ash"]]
    digest, nonce, salt = commit(signer, CHAIN, "segmentation", 3, _update("ash", 3))
    assert (digest, nonce, salt) == commit(signer, CHAIN, "segmentation", 3, _update("ash", 3))
    commitment = Commitment("segmentation", 3, five.ids["ash"], digest, nonce, five.ids["elm"])
    assert opens(commitment, salt, _update("ash", 3))
    assert not opens(commitment, salt, _update("ash", 2))
    assert not opens(commitment, "00" * 32, _update("ash", 3))
    assert not opens(commitment, "no hex", _update("ash", 3))
    others = {commit(signer, CHAIN, "segmentation", n, _update("ash", 3))[2] for n in range(4)}
    assert len(others) == 4  # a salt opens one round


def _resigned(five: Hospitals, records: tuple, place: int, **changes: object) -> tuple:
    """The records with one of them changed and signed again by whoever signed it: a lie, not a forgery."""
    record = replace(records[place], **changes)
    signed = record.signed(five.signers[record.hospital], BOUND)
    if isinstance(signed, Commitment) and signed.peer in five.signers:
        signed = signed.countersigned(five.signers[signed.peer], BOUND)
    return (*records[:place], signed, *records[place + 1 :])


def test_every_lie_about_a_round_is_refused_by_name(five, round_of):
    history = five.history()
    errors = _measured({"elm": 0.9})
    records = five.propose(history, round_of(), errors)
    commitment, ballot, decision, record = records[0], records[5], records[10], records[11]
    others = [five.ids[name] for name in NAMES]
    loser = next(index for index, (c, _) in enumerate(decision.errors) if c not in decision.accepted)
    whitewashed = tuple(
        sorted((*decision.errors[:loser], (decision.errors[loser][0], "0.5"), *decision.errors[loser + 1 :]))
    )
    shares = tuple((member, "0.2") for member in sorted(others))
    for changed, words in (
        (records[1:], r"ballot\.hospital: .* has not committed to round 0"),
        ((*records[:10], record), "the ballots of round 0 have no decision"),
        ((*records[:5], replace(record, cohort=NAMES[:4])), "round.cohort: not those who committed"),
        ((*records[:4], record), "round.cohort: not those who committed"),
        ((replace(commitment, signature="00" * 64), *records[1:]), "commitment.signature"),
        ((replace(commitment, countersignature="00" * 64), *records[1:]), "commitment.countersignature"),
        ((commitment.countersigned(five.owner, BOUND), *records[1:]), "commitment.countersignature"),
        (
            (*records[:5], commitment.countersigned(five.signers[commitment.peer], BOUND), *records[5:]),
            "already in the chain",
        ),
        (
            _resigned(five, records, 1, nonce=records[0].nonce, hospital=records[0].hospital, peer=records[0].peer),
            "nonce .* was used|commits twice",
        ),
        (_resigned(five, records, 6, hospital=ballot.hospital), "votes twice|scores itself|nonce"),
        (
            _resigned(five, records, 5, errors=tuple(sorted((*ballot.errors, (ballot.hospital, "0.0"))))),
            "scores itself",
        ),
        (_resigned(five, records, 5, errors=(("0" * 64, "0.1"),)), "has not committed"),
        ((*records[:11], *records[5:6], record), "already in the chain"),
        ((*records[:6], _resigned(five, records, 5, nonce="34" * 16)[5], *records[6:]), "votes twice"),
        (_resigned(five, records, 10, weights=shares), "not what the ballots"),
        (_resigned(five, records, 10, errors=whitewashed), "not what the ballots"),
        (
            _resigned(five, records, 10, hospital=next(o for o in others if o != decision.hospital)),
            "does not lead block 1",
        ),
    ):
        with pytest.raises(LedgerError, match=words):
            five.extend(history, changed)
        assert len(history.blocks) == 1
    five.extend(history, records)


def test_a_vote_after_the_decision_is_refused(five, round_of):
    history = five.history()
    records = five.propose(history, round_of(), _measured({}))
    late = records[9]
    without = (
        *records[:9],
        *five.propose(history, round_of(), {v: r for v, r in _measured({}).items() if five.ids[v] != late.hospital})[
            9:10
        ],
    )
    with pytest.raises(LedgerError, match="round 0 is decided"):
        five.extend(history, (*without, late, records[11]))


def test_statements_do_not_replay_in_the_round_a_later_round_or_another_chain(five, round_of):
    history = five.history()
    records = five.propose(history, round_of(0), _measured({}))
    five.extend(history, records)
    with pytest.raises(LedgerError, match="already in the chain"):
        five.extend(history, (records[0], round_of(1)))
    again = replace(records[0], round=1)
    with pytest.raises(LedgerError, match=r"commitment\.signature"):
        five.extend(history, (again, round_of(1)))
    fresh = five.propose(history, round_of(1))
    nonce = _resigned(five, fresh, 0, nonce=records[0].nonce)
    with pytest.raises(LedgerError, match="was used in block 1"):
        five.extend(history, nonce)
    other = History()
    rules = ConsensusRules(quorum="two_thirds")
    twin = History()  # of the same name, by another owner
    thief = Signer((9).to_bytes(32, "big"))
    twin_members = five.registered(chain_binding(CHAIN, thief.public_key))
    twin.extend(twin.next_block((Genesis(CHAIN, thief.public_key), rules, *twin_members), thief))
    with pytest.raises(LedgerError, match=r"commitment\.signature"):
        twin.extend(twin.next_block(records, thief, list(five.signers.values())))
    members = five.registered(chain_binding("trial-6", five.owner.public_key))
    other.extend(other.next_block((Genesis("trial-6", five.owner.public_key), rules, *members), five.owner))
    with pytest.raises(LedgerError, match=r"commitment\.signature"):
        five.extend(other, records)
    stale = _resigned(five, records, 0, nonce="12" * 16)
    with pytest.raises(LedgerError, match="comes after round 0"):
        five.extend(history, (stale[0], round_of(1)))


def test_a_rotated_key_signs_from_then_on_and_the_old_one_no_longer(five, round_of):
    history = five.history()
    ash, old, new = five.ids["ash"], five.signers[five.ids["ash"]], Signer.generate()
    five.extend(history, five.propose(history, round_of(0)))
    rotation = Rotation(ash, new.public_key, "ab" * 16)
    honest = rotation.signed(old, BOUND).proven(new, BOUND)
    taken = Rotation(ash, five.signers[five.ids["elm"]].public_key, "ac" * 16)
    for bad, words in (
        (rotation.signed(new, BOUND).proven(new, BOUND), r"rotation\.signature"),
        (rotation.signed(old, BOUND).proven(old, BOUND), r"rotation\.possession"),
        (taken.signed(old, BOUND).proven(five.signers[five.ids["elm"]], BOUND), "uses this key, or did"),
    ):
        with pytest.raises(LedgerError, match=words):
            five.extend(history, (bad,))
    five.extend(history, (honest,))
    assert from_canonical(honest.to_canonical()) == honest
    with pytest.raises(LedgerError, match=r"commitment\.signature|countersignature"):
        five.extend(history, five.propose(history, round_of(1)))
    renewed = Hospitals()
    renewed.signers = {**five.signers, ash: new}
    renewed.extend(history, renewed.propose(history, round_of(1)))
    assert len(history.blocks) == 4  # what the old key signed before still stands


def test_a_revoked_hospital_neither_signs_nor_counts(five, round_of):
    history = five.history(quorum="all")
    elm = five.ids["elm"]
    five.extend(history, (Revocation(elm, "key lost"),))
    assert history.index.members() == tuple(sorted(set(five.signers) - {elm}))
    with pytest.raises(LedgerError, match=r"'elm' was revoked in block 1|not registered|is not in"):
        five.extend(history, (*five.propose(history, round_of(0, cohort=NAMES[:4])), round_of(1)), 4)
    with pytest.raises(LedgerError, match="was revoked in block 1"):
        five.extend(history, (Revocation(elm, "again"),), 4)
    records = five.propose(history, round_of(0, cohort=NAMES[:4]))
    block = history.next_block(records, five.owner, list(five.signers.values()))
    assert elm not in dict(block.approvals), "a key that is given but revoked approves nothing"
    for approvals in ((*block.approvals, (elm, "00" * 64)), (*block.approvals[1:], (elm, "00" * 64))):
        with pytest.raises(LedgerError, match=r"more than the members|not a member"):
            history.extend(replace(block, approvals=tuple(sorted(approvals))))
    history.extend(block)


def test_leaders_take_turns(five):
    ids = list(five.signers)
    turns = [leader_of(height, ids) for height in range(10)]
    assert turns[:5] == turns[5:] == sorted(ids)


def test_work_is_checked_against_the_rules_and_not_the_blocks_word(five, round_of):
    history = five.history(quorum="owner", proof_of_work=6)
    block = history.next_block(five.propose(history, round_of()), five.owner)
    assert has_work(block.hash(), 6)
    assert block.work is not None
    idle = next(w for w in range(1000) if not has_work(replace(block, work=w).hash(), 6))

    def signed(history: History, block: Block) -> Block:
        """The block with the owner's true signature: only the work is missing."""
        frontier = history._frontier.grown(block.hash())
        head = SignedHead.sign(five.owner, CHAIN, frontier.size, frontier.root())
        return replace(block, signature=head.signature)

    for bad in (replace(block, work=None), replace(block, work=idle)):
        with pytest.raises(LedgerError, match="6 zero bits"):
            history.extend(signed(history, bad))
    history.extend(block)
    free = five.history(quorum="owner")
    plain = free.next_block(five.propose(free, round_of()), five.owner)
    with pytest.raises(LedgerError, match="0 zero bits"):
        free.extend(signed(free, replace(plain, work=0)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quorum", "half"), ("quorum", None), ("combine", "max"), ("self_report", 1), ("gamma", "-1.0"),
        ("gamma", None), ("gamma", 1.0), ("margin", "nan"), ("proof_of_work", 25), ("proof_of_work", True),
    ],
)  # fmt: skip
def test_rules_that_are_none_are_refused_by_field(field, value):
    with pytest.raises(RecordError, match=rf"rules\.{field}"):
        ConsensusRules(**{field: value})


def test_rules_are_stated_once_at_the_beginning(five):
    history = five.history()
    with pytest.raises(LedgerError, match="states its rules once"):
        five.extend(history, (ConsensusRules(quorum="owner"),))


def test_the_identity_of_a_statement_excludes_its_signatures(five, round_of):
    history = five.history()
    first = five.propose(history, round_of())[0]
    assert record_id(first) == record_id(replace(first, signature="", countersignature=""))
    assert record_id(first) != record_id(replace(first, nonce="00" * 16))


def test_an_exact_error_is_quantized_and_what_is_not_finite_has_none():
    assert [quantize(x) for x in (0.123456, -1.0, 7.0, float("nan"), float("inf"))] == [
        "0.1235",
        "0.0",
        "1.0",
        None,
        None,
    ]


def test_a_lone_hospital_cannot_countersign_itself(round_record):
    one = Hospitals(1)
    history = one.history(quorum="owner")
    with pytest.raises(LedgerError, match="1 members: a commitment needs a second"):
        one.propose(history, round_record(0, cohort=("ash",)))


def test_the_first_block_holds_rules_and_members_only(five, round_of):
    genesis, rules = Genesis(CHAIN, five.owner.public_key), ConsensusRules(quorum="all")
    for records, words in (
        ((genesis, *five.registrations, round_of(1)), "rules and registrations only"),
        ((genesis, *five.registrations, Revocation(five.ids["elm"], "x")), "rules and registrations only"),
        ((genesis, *five.registrations, rules), "right after its genesis"),
        ((genesis, rules), "at least 2 members"),
        ((genesis, rules, five.registrations[0]), "at least 2 members"),
    ):
        with pytest.raises(LedgerError, match=words):
            History().next_block(records, five.owner)
    two = History()
    two.extend(two.next_block((genesis, rules, *five.registrations[:2]), five.owner))
    members = [five.signers[five.ids[name]] for name in NAMES[:2]]
    with pytest.raises(LedgerError, match="at least 2 members"):
        two.next_block((Revocation(five.ids["ash"], "x"),), five.owner, members)


def test_nobody_commits_once_the_vote_has_begun(five, round_of):
    history = five.history()
    four = NAMES[:4]
    records = five.propose(history, round_of(0, cohort=four), {v: {c: 0.2 for c in four if c != v} for v in four})
    late = five.propose(history, round_of(0))
    commitment = next(r for r in late if r.hospital == five.ids["elm"])
    with pytest.raises(LedgerError, match="the vote on round 0 has begun"):
        five.extend(history, (*records[:-1], commitment, round_of(0)))


def test_a_leader_cannot_choose_by_leaving_ballots_out(five, round_of):
    history = five.history()
    some = {voter: row for voter, row in _measured({"ash": 0.9}).items() if voter in NAMES[:3]}
    with pytest.raises(LedgerError, match="3 ballots of 5 models: it takes 4"):
        five.extend(history, five.propose(history, round_of(), some))
    none = five.propose(history, round_of())
    leader = leader_of(1, list(five.signers))
    empty = Decision("segmentation", 0, leader, tuple((i, None) for i in sorted(five.signers)), ())
    with pytest.raises(LedgerError, match="0 ballots of 5 models"):
        five.extend(history, (*none[:-1], empty.signed(five.signers[leader], BOUND), none[-1]))


def test_who_has_not_committed_casts_no_vote_and_makes_up_for_none(five, round_of):
    history, four = five.history(), NAMES[:4]
    votes = {v: {c: 0.2 for c in four if c != v} for v in ("ash", "birch", "elm")}
    with pytest.raises(LedgerError, match=rf"ballot\.hospital: {five.ids['elm'][:8]} has not committed to round 0"):
        five.extend(history, five.propose(history, round_of(cohort=four), votes))


def test_no_voter_spares_a_model_the_others_judge(five, round_of):
    first, second, *_, last = sorted(NAMES, key=five.ids.__getitem__)  # in the order of their ballots
    for voter, spared in ((first, second), (first, last), (second, first), (second, last), (last, first)):
        history, votes = five.history(), _measured({})
        del votes[voter][spared]
        words = r"ballot\.errors: .* is a candidate on some ballots of round 0 only: all list the same models"
        with pytest.raises(LedgerError, match=words):
            five.extend(history, five.propose(history, round_of(), votes))
        assert len(history.blocks) == 1


def test_a_model_on_which_nobody_could_vote_is_on_no_ballot(five, round_of):
    history = five.history()
    votes = {v: {c: 0.2 for c in NAMES if c not in (v, "elm")} for v in NAMES}
    five.extend(history, five.propose(history, round_of(), votes))
    assert dict(history.index.decisions["segmentation", 0].errors)[five.ids["elm"]] is None


def _findings(five: Hospitals, folder, record: RoundRecord, votes: Mapping[str, Mapping[str, float]]) -> list[Finding]:
    """What `verify` says of consensus on a chain of this round."""
    rules = ConsensusRules(quorum="two_thirds")
    with Ledger.create(
        folder, signer=five.owner, chain_id=CHAIN, registrations=five.registrations, rules=rules
    ) as ledger:
        ledger.approvers = five.signers.values
        ledger.append(*five.propose(ledger._history, record, votes))
    return verify(
        folder, recompute_leaves=lambda r: dict(r.leaves), recompute_epsilon=lambda r: r.epsilon,
        configuration_hash=record.configuration_hash,
    )  # fmt: skip


def test_missing_ballots_and_too_few_votes_are_warnings_that_name_them(five, round_of, tmp_path):
    def votes(kind: str, record: RoundRecord, given: Mapping[str, Mapping[str, float]]) -> tuple[Status, str]:
        found = [f for f in _findings(five, tmp_path / kind, record, given) if f.check == "votes" and f.round == 0]
        (finding,) = found
        return finding.status, finding.detail.split("; ", 2)[-1]

    assert votes("whole", round_of(), _measured({})) == (Status.OK, "out-voted: nobody")
    without = {voter: row for voter, row in _measured({}).items() if voter != "dogwood"}
    assert votes("silent", round_of(), without) == (Status.WARNING, "no ballot of dogwood")
    three = NAMES[:3]
    few = {v: {c: 0.2 for c in three if c != v} for v in three}
    assert votes("few", round_of(cohort=three), few) == (
        Status.WARNING,
        "a model with 2 votes, where one false voter decides",
    )
    nobody = {v: {c: 0.2 for c in NAMES if c not in (v, "elm")} for v in NAMES}  # could vote on elm's
    assert votes("not finite", round_of(), nobody) == (Status.OK, "out-voted: elm")


def test_what_others_keep_by_design_raises_no_doubt_and_nothing_else_is_excused(five, round_of, tmp_path):
    findings = _findings(five, tmp_path / "chain", round_of(), _measured({}))
    outside = [(f.check, f.status) for f in findings if f.outside]
    assert outside == [(check, Status.UNVERIFIABLE) for check in ("witness", "votes", "commitments")]
    assert not any(finding.doubtful for finding in findings)
    for status, outside, doubtful in (
        (Status.UNVERIFIABLE, False, True), (Status.UNVERIFIABLE, True, False), (Status.WARNING, False, True),
        (Status.OK, False, False),
    ):  # fmt: skip
        assert Finding("tensors", status, outside=outside).doubtful is doubtful


@pytest.mark.parametrize("ballots", [False, True])
def test_no_block_of_a_round_is_longer_than_its_bound_which_is_near(five, round_of, ballots):
    history = five.history(proof_of_work=1)
    votes = {v: {c: 0.1234 for c in NAMES if c != v} for v in NAMES} if ballots else None
    five.extend(history, five.propose(history, round_of(), votes))
    block = history.blocks[-1]
    rest = len(canonical.encode(block.records[-1].to_canonical()))
    bound = longest_statements("segmentation", members=5, cohort=5, ballots=ballots)
    assert 0.85 * bound < len(block.encode()) - rest <= bound


def test_one_key_is_never_two_members(five):
    history = five.history(quorum="owner")
    old, new = five.signers[five.ids["ash"]], Signer((77).to_bytes(32, "big"))
    rotation = Rotation(five.ids["ash"], new.public_key, "ab" * 16).signed(old, BOUND).proven(new, BOUND)
    five.extend(history, (rotation,), 0)
    for key in (new, old):
        twin = Registration.of(key, "twin", "lung CT", 1, BOUND)
        with pytest.raises(LedgerError, match=r"uses this key, or did|already registered"):
            five.extend(history, (twin,), 0)
    back = Rotation(five.ids["ash"], old.public_key, "ac" * 16).signed(new, BOUND).proven(old, BOUND)
    with pytest.raises(LedgerError, match="uses this key, or did"):
        five.extend(history, (back,), 0)


def test_patients_are_those_of_registered_hospitals_and_of_all_of_the_cohort(five, round_of):
    history = five.history(quorum="owner")
    rows = tuple((name, 4, None) for name in NAMES)
    for patients, words in ((("oak", 4, None), *rows), "'oak' is not registered"), (rows[1:], "is missing"):
        with pytest.raises(LedgerError, match=words):
            five.extend(history, (round_of(0, patients=tuple(sorted(patients))),), 0)
    five.extend(history, (round_of(0, patients=rows),), 0)


def test_nobody_registers_with_a_key_he_does_not_hold(five, stranger):
    history = five.history(quorum="owner")
    honest = Registration.of(stranger, "oak", "lung CT", 1, BOUND)
    for bad in (
        replace(honest, possession=""),
        honest.proven(five.owner, BOUND),
        honest.proven(stranger, chain_binding("trial-6", five.owner.public_key)),
        replace(honest, records=2),
    ):
        with pytest.raises(LedgerError, match=r"registration\.possession: 'oak': not signed by its key on this chain"):
            five.extend(history, (bad,), 0)
    five.extend(history, (honest,), 0)


def test_the_worst_models_are_out_voted_equal_ones_alike_and_a_small_crowd_decides_nothing():
    ids = [f"{index:064x}" for index in range(6)]

    def accepted(errors: Sequence[str | None], **rules: Any) -> list[int]:
        rows = [tuple((c, e) for c, e in zip(ids, errors, strict=False) if c != v and e != "?") for v in ids]
        ballots = [Ballot("t", 0, v, row, "00" * 16) for v, row in zip(ids, rows, strict=True)]
        settings: dict[str, Any] = {"margin": None} | rules
        stated = ConsensusRules(**settings)
        combined, weights = decide(stated, ballots, ids[: len(errors)])
        assert [member for member, _ in combined] == ids[: len(errors)]
        shared = [float(e) for e in (1.0 if e is None else e for e in errors) if e != "?"]
        for member, weight in weights:
            mine = float(errors[ids.index(member)] or 1.0) + sum(shared) / len(shared)
            others = [float(errors[ids.index(m)] or 1.0) + sum(shared) / len(shared) for m, _ in weights]
            assert float(str(weight)) == pytest.approx((1 / mine) / sum(1 / other for other in others))
        return [ids.index(member) for member, _ in weights]

    assert accepted(["0.1", "0.2", "0.9", "0.3"], byzantine=1) == [0, 1, 3]
    assert accepted(["0.1", "0.2", "0.2", "0.1"], byzantine=1) == [0, 1, 2, 3]
    assert accepted(["0.1", "0.2", None, "0.2"], byzantine=1) == [0, 1, 3]  # no finite error counts as 1
    assert accepted(["0.1", "0.2", "?", "0.2"]) == [0, 1, 3]  # on an update that is not finite nobody votes
    assert accepted(["0.1", "0.2", "?", "0.2"], byzantine=1) == []
    assert accepted(["0.1", "0.2", "0.9"], byzantine=1) == []
    assert accepted(["0.1", "0.2", "0.9", "0.35"], margin="0.1") == [0, 1, 3]
    assert accepted(["0.1", "0.2", "0.9", "0.35"], margin="0.0") == [0, 1]
    assert accepted(["?", "?"], byzantine=0) == []


def test_approvals_beyond_the_quorum_come_off_and_change_nothing_that_the_chain_says(five, round_of):
    history = five.history()
    block = history.next_block(
        five.propose(history, round_of(), _measured({})), five.owner, list(five.signers.values())
    )
    stripped = replace(block, approvals=block.approvals[1:])
    assert stripped.hash() == block.hash()
    fewer = five.history()
    with pytest.raises(LedgerError, match="3 of 5 members, the rules ask for 4"):
        fewer.extend(replace(block, approvals=block.approvals[2:]))
    fewer.extend(stripped)
    history.extend(block)
    assert fewer.head() == history.head()
    member, signature = block.approvals[0]
    # Whoever approved holds a signature that still stands for the whole chain.
    assert fewer.head().is_approved(five.signers[member].public_key, bytes.fromhex(signature))


def test_a_block_of_another_version_says_so(five):
    block = five.history().blocks[0].encode().replace(b"block.v2", b"block.v9")
    with pytest.raises(VersionError, match=r"written by a newer version of capsfl \(block\.v9, "):
        Block.decode(block)
    with pytest.raises(VersionError, match=r"written by an older version of capsfl \(block\.v1, "):
        Block.decode(block.replace(b"block.v9", b"block.v1"))
