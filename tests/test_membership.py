"""Hospitals join and leave between two starts: by permission, in the ledger, and without cost in privacy."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from capsfl.config import ConfigError, load_config
from capsfl.federated import Federation, LocalConfig, RoundsConfig
from capsfl.federated.hospitals import seat_hospitals, select_hospitals, stack_hospitals
from capsfl.learning.tasks import Task
from capsfl.ledger.chain import Ledger
from capsfl.ledger.consensus import ConsensusRules
from capsfl.ledger.errors import LedgerError
from capsfl.ledger.keys import Signer, chain_binding
from capsfl.ledger.records import RoundRecord, parameters_root
from capsfl.ledger.statements import Registration
from capsfl.membership import MembershipError, record_members, seat, vacant_names
from capsfl.privacy.plan import PrivacyConfig

HERE = Path("runs/study")


@pytest.mark.parametrize(
    ("roster", "hospitals", "places", "expected"),
    [
        ("", "BA", None, "AB"),
        ("AB", "AB", None, "AB"),
        ("", "BA", 4, "AB"),
        ("BC", "ABCD", 4, "BCAD"),
        ("ABC", "AC", 3, "ABC"),
        ("ABC", "CD", 4, "ABCD"),
    ],
)
def test_a_place_is_kept_by_who_has_it_and_given_in_the_order_of_joining(roster, hospitals, places, expected):
    assert seat(roster, hospitals, places=places, folder=HERE) == tuple(expected)


@pytest.mark.parametrize(
    ("roster", "hospitals", "places", "message"),
    [
        ("AB", "ABC", None, "runs/study: begun with the hospitals A, B, and since then C joined; bring the data back"),
        ("AB", "A", None, "since then B left"),
        ("AB", "AC", None, "since then C joined and B left"),
        ("AB", "ABCD", 3, "places = 3: 2 are taken, none of which is given away again, and C, D would join"),
        ("ABC", "AD", 3, "places = 3: 3 are taken"),
        ("", "ABC", 2, "places = 2: 0 are taken"),
    ],
)
def test_who_may_not_come_or_go_is_named(roster, hospitals, places, message):
    with pytest.raises(MembershipError, match=message):
        seat(roster, hospitals, places=places, folder=HERE)


KEYS = {name: Signer.generate() for name in ("owner", "A", "B", "C")}


def register(name: str) -> Registration:
    """The registration of a hospital."""
    return Registration.of(KEYS[name], name, "lung CT", 3, chain_binding("x", KEYS["owner"].public_key))


def round_of(number: int, *cohort: str) -> RoundRecord:
    """The record of a round of a model without weights worth the name."""
    leaves = {"w": "0a" * 32}
    return RoundRecord(
        round=number, task="segmentation", parameters_digest=parameters_root(leaves), leaves=tuple(leaves.items()),
        cohort=cohort, sampler="all", clip_norm=None, noise_multiplier=None, expected_cohort=None, epsilon=None,
        delta=None, configuration_hash="0" * 64, code_version="1",
    )  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of two hospitals after one round, whose checkpoint is there."""
    (tmp_path / "checkpoints" / "segmentation" / "1").mkdir(parents=True)
    registrations = [register("A"), register("B")]
    with Ledger.create(tmp_path / "ledger", signer=KEYS["owner"], chain_id="x", registrations=registrations) as ledger:
        ledger.append(round_of(1, "A", "B"))
        yield ledger


def test_the_ledger_says_who_has_joined_and_who_has_left_and_holds_them_to_it(ledger: Ledger, tmp_path: Path):
    before = len(ledger.blocks())
    record_members(ledger, ["A", "B"], register, tmp_path / "checkpoints")
    assert len(ledger.blocks()) == before, "nothing has changed"
    record_members(ledger, ["A", "C"], register, tmp_path / "checkpoints")
    assert [block.records[0].type for block in ledger.blocks()[before:]] == ["registration", "revocation"]
    record_members(ledger, ["A", "C"], register, tmp_path / "checkpoints")
    assert len(ledger.blocks()) == before + 2, "once"
    ledger.append(round_of(2, "A", "C"))
    with pytest.raises(LedgerError, match="'B' was revoked"):
        ledger.append(round_of(3, "A", "B"))
    with pytest.raises(MembershipError, match="B has left this run and its key is revoked"):
        record_members(ledger, ["A", "B", "C"], register, tmp_path / "checkpoints")


def test_a_round_that_has_to_be_run_again_is_run_by_those_who_ran_it(ledger: Ledger, tmp_path: Path):
    ledger.append(round_of(2, "A", "B"))
    with pytest.raises(MembershipError, match=r"round 2 of segmentation is recorded .* before C may"):
        record_members(ledger, ["A", "B", "C"], register, tmp_path / "checkpoints")
    record_members(ledger, ["A", "B"], register, tmp_path / "checkpoints")


def test_those_who_are_there_approve_who_joins_and_who_leaves(tmp_path: Path):
    known = ["A", "B"]
    with Ledger.create(
        tmp_path / "ledger", signer=KEYS["owner"], chain_id="x", registrations=[register("A"), register("B")],
        rules=ConsensusRules(quorum="all"),
    ) as ledger:  # fmt: skip
        ledger.approvers = lambda: [KEYS["A"], KEYS["C"]]
        with pytest.raises(LedgerError, match="1 of 2 members, the rules ask for 2"):
            ledger.append(register("C"))
        ledger.approvers = lambda: [KEYS[name] for name in known]
        known.append("C")  # its key is made as it joins, and approves from the next block on
        record_members(ledger, ["A", "C"], register, tmp_path / "checkpoints")
        assert [len(block.approvals) for block in ledger.blocks()] == [0, 2, 3]
        known.remove("C")
        binding = chain_binding("x", KEYS["owner"].public_key)
        with pytest.raises(LedgerError, match="1 of 2 members"):
            ledger.append(Registration.of(Signer.generate(), "D", "lung CT", 3, binding))


TASK = Task(
    "mean",
    lambda w, batch: 0.5 * ((w[None] - batch["x"]) ** 2).sum(),
    lambda w, batch, weight: {},
    np.zeros(2, np.float32),
    lambda w: w,
)
VALUES = {"A": 1, "B": 2, "C": 4}
RECORDS = stack_hospitals({name: {"x": np.full((2, 2), value, np.float32)} for name, value in VALUES.items()})


def federation(hospitals, **privacy) -> Federation:
    """One plain step of local training with a clip norm that nothing reaches."""
    local = LocalConfig(optimizer="sgd", learning_rate=0.1, batch_size=2)
    config = PrivacyConfig(clip_norm=100.0, **privacy)
    return Federation(TASK, hospitals, config=RoundsConfig(local=local), privacy=config)


def test_a_vacant_place_is_accounted_drawn_and_adds_nothing():
    names = vacant_names(("B", "A"), 4)
    seated = seat_hospitals(select_hospitals(RECORDS, ["A", "B"]), names)
    assert seated.names[:2] == ("B", "A")
    assert seated.counts.tolist() == [2, 2, 0, 0]
    engine = federation(seated)
    assert engine.plan.mechanism.hospitals == 4
    state, report = engine.step(engine.init())
    assert set(report.cohort) == {"A", "B"}
    both = federation(select_hospitals(RECORDS, ["A", "B"]))
    expected, _ = both.step(both.init())
    # m counts the places: the same sum, divided by four instead of two.
    np.testing.assert_allclose(2 * np.asarray(state.parameters), np.asarray(expected.parameters), rtol=1e-6)


def test_who_sits_beside_a_hospital_changes_neither_when_it_is_drawn_nor_what_it_draws():
    """The mechanism that is accounted runs over the places, whoever takes them."""

    def cohorts(members: str) -> list[set[str]]:
        seated = seat_hospitals(select_hospitals(RECORDS, list(members)), vacant_names(tuple("ABC"), 6))
        engine = federation(seated, sampler="poisson", cohort=3, noise_multiplier=1.0)
        return [set(np.asarray(seated.names)[d.indices[d.mask]]) for d in map(engine._draw, range(20))]

    everybody, without = cohorts("ABC"), cohorts("AC")
    assert [cohort - {"B"} for cohort in everybody] == without
    assert any("B" in cohort for cohort in everybody)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("[data]\nresidence = 'disk'", "places = 4: hospitals on disk can neither join nor leave"),
        ("[privacy]\nclip_norm = 1.0\nunit = 'patient'", "places = 4: patients are accounted for hospitals that stay"),
    ],
)
def test_what_cannot_be_combined_with_places_is_refused(tmp_path: Path, lines: str, message: str):
    (tmp_path / "study.toml").write_text(f"places = 4\n[phantom]\n[segmentation]\n{lines}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "study.toml")
