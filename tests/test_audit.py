"""The mechanism that a ledger records is held against the configuration, round by round and hospital by hospital."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capsfl.audit import chain_of, check_mechanism, check_sequence, plan_of_records
from capsfl.cli import main
from capsfl.config import ClassificationStage, SegmentationStage, StudyConfig
from capsfl.ct.phantom import PhantomConfig
from capsfl.ledger.canonical import decimal
from capsfl.ledger.chain import Ledger
from capsfl.ledger.keys import Signer
from capsfl.ledger.records import RoundRecord, parameters_root
from capsfl.ledger.statements import Registration, Revocation
from capsfl.ledger.storage import frame, read_frame
from capsfl.ledger.verify import Status
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.patient_plan import Stage
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan
from capsfl.study import StudyFolder

PATIENTS = (("A", 12), ("B", 30))
PRIVATE = PrivacyConfig(
    unit="patient", clip_norm=0.5, noise_multiplier=2.0, expected_patients=4, patient_truncation=12, delta=1e-3
)
LEAVES = (("weights", "ab" * 32),)


def study(privacy: PrivacyConfig) -> StudyConfig:
    return StudyConfig(phantom=PhantomConfig(), segmentation=SegmentationStage(rounds=2), privacy=privacy)


@pytest.fixture(scope="module")
def registrations() -> list[Registration]:
    found = []
    for name, count in PATIENTS:
        key = Signer.generate()
        found.append(Registration.of(key, name, "lung CT", count, "chain"))
    return found


def record(number: int, **changes) -> RoundRecord:
    """What an honest run writes of a round; `changes` are lies."""
    plan = PrivacyPlan.build(PRIVATE, num_hospitals=2, stages=[Stage("segmentation", 2, 1, PATIENTS)])
    assert plan.patients is not None
    losses = plan.patients.losses(number)
    honest = RoundRecord(
        round=number, task="segmentation", parameters_digest=parameters_root(dict(LEAVES)), leaves=LEAVES,
        cohort=("A", "B"), sampler="all", clip_norm="0.5", noise_multiplier="2.0", expected_cohort="2.0",
        epsilon=decimal(plan.epsilon(number) or 0.0), delta="0.001", configuration_hash="0" * 64, code_version="1",
        patients=tuple((loss.hospital, loss.patients, decimal(loss.epsilon or 0.0)) for loss in losses),
    )  # fmt: skip
    return replace(honest, **changes)


def check(records, registrations, privacy=PRIVATE):
    plan = plan_of_records(records, study(privacy), holders=len(registrations))
    return check_mechanism(Path("nowhere"), [*registrations, *records], plan)


def test_an_honest_run_is_as_configured(registrations):
    findings = check([record(1), record(2)], registrations)
    assert [finding.status for finding in findings] == [Status.OK, Status.OK]


HONEST: Any = record(2).patients


@pytest.mark.parametrize(
    ("lie", "detail"),
    [
        ({"sampler": "poisson"}, "sampler: recorded poisson, by configuration all"),
        ({"clip_norm": "5.0"}, "clip_norm: recorded 5.0, by configuration 0.5"),
        ({"noise_multiplier": "4.0"}, "noise_multiplier: recorded 4.0"),
        ({"expected_cohort": "3.0"}, "expected_cohort: recorded 3.0"),
        ({"delta": "0.1"}, "delta: recorded 0.1"),
        ({"patients": None}, "patients of A: recorded None"),
        ({"patients": HONEST[1:]}, "patients of A: recorded None"),
        (
            {"patients": (("A", 24, HONEST[0][2]), HONEST[1])},
            "patients of A: recorded 24, 12 in the task's first round",
        ),
        ({"patients": (("A", 12, "0.01"), HONEST[1])}, "epsilon of A's patients: recorded 0.01, recomputed"),
        ({"patients": (HONEST[0], ("B", 30, None))}, "epsilon of B's patients: recorded None, recomputed"),
    ],
)
def test_a_lie_about_the_mechanism_is_named(registrations, lie, detail):
    first, second = check([record(1), record(2, **lie)], registrations)
    assert first.status is Status.OK
    assert (second.status, second.round) == (Status.FAILED, 2)
    assert second.detail.startswith(detail)


def test_patients_beyond_those_registered_are_named(registrations):
    """More patients would mean a smaller epsilon, and whoever registered fewer does not have them."""
    many = (("A", 12, "1.0"), ("B", 300, "0.1"))
    findings = check([record(1, patients=many)], registrations)
    assert findings[0].status is Status.FAILED
    assert findings[0].detail == "patients of B: recorded 300, 300 in the task's first round, 30 registered"


def test_records_without_patients_fit_no_plan_of_patients(registrations):
    with pytest.raises(PrivacyError, match="needs the number of each hospital's patients"):
        plan_of_records([record(1, patients=None)], study(PRIVATE), holders=2)


def test_a_quantile_run_records_the_norm_of_its_round(registrations):
    privacy = PrivacyConfig(clip_norm=0.1, noise_multiplier=2.0, clipping="quantile")
    words: dict[str, Any] = {"patients": None, "delta": "1e-05"}
    right = record(1, clip_norm=decimal(0.10000000149011612), **words)
    assert check([right], registrations, privacy)[0].status is Status.OK
    wrong = record(1, clip_norm="0.2", **words)
    assert check([wrong], registrations, privacy)[0].detail.startswith("clip_norm: recorded 0.2")


@pytest.mark.parametrize(
    ("clipping", "why", "outside"),
    [
        ("quantile", "the checkpoint before, which has it, is gone", False),
        ("median", "the hospitals keep their norms", True),
    ],
)
def test_a_clip_norm_that_cannot_be_recomputed_is_never_ok(registrations, clipping, why, outside):
    privacy = PrivacyConfig(clip_norm=0.1, noise_multiplier=2.0 if clipping == "quantile" else 0.0, clipping=clipping)
    words: dict[str, Any] = {
        "patients": None, "delta": "1e-05", "noise_multiplier": decimal(privacy.noise_multiplier), "epsilon": None
    }  # fmt: skip
    records = [record(number, clip_norm=decimal(0.10000000149011612), **words) for number in (1, 2)]
    finding = check(records, registrations, privacy)[1]
    assert (finding.status, finding.outside) == (Status.UNVERIFIABLE, outside)
    assert finding.detail == f"clip_norm: recorded 0.10000000149011612, {why}; the rest as configured"
    lie = check([records[0], replace(records[1], sampler="poisson")], registrations, privacy)[1]
    assert (lie.status, lie.detail) == (Status.FAILED, "sampler: recorded poisson, by configuration all")


def sequence(*rounds: tuple[str, int], late=(), places: int | None = None) -> tuple[Status, str]:
    """What the audit says of a chain with these rounds, of a study of two and two."""
    config = StudyConfig(
        phantom=PhantomConfig(), segmentation=SegmentationStage(rounds=2), classification=ClassificationStage(rounds=2),
        places=places,
    )  # fmt: skip
    records = [replace(record(1), task=task, round=number) for task, number in rounds]
    (finding,) = check_sequence([*records, *late], config)
    return finding.status, finding.detail


def test_a_round_left_out_is_named_since_it_hides_what_it_cost():
    first, second = ("segmentation", 1), ("segmentation", 2)
    last = ("classification", 1)
    for whole in ((), (first,), (first, second), (first, second, last)):
        assert sequence(*whole)[0] is Status.OK
    for rounds, detail in (
        ((second,), "round 2 follows round 0"),
        ((first, last), "classification begins after 1 of 2 rounds of segmentation"),
        ((last,), "classification begins after 0 of 2 rounds"),
        ((first, second, ("segmentation", 3)), "round 3 of 2"),
        ((("pruning", 1),), "pruning is no stage"),
    ):
        status, found = sequence(*rounds)
        assert status is Status.FAILED
        assert detail in found


def test_hospitals_that_come_after_the_first_round_need_places(registrations):
    late = [Revocation("ab" * 32, "left")]
    assert sequence(("segmentation", 1), late=registrations)[0] is Status.FAILED
    assert sequence(("segmentation", 1), late=late)[0] is Status.FAILED
    assert sequence(("segmentation", 1), late=[*registrations, *late], places=4)[0] is Status.OK


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, StudyConfig]:
    """A study's folder in which no run has begun."""
    config = study(PRIVATE).model_copy(update={"out": str(tmp_path / "study")})
    with StudyFolder.open(config):
        return tmp_path / "study", config


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("none", "federated/ledger: no ledger here: name a study whose training has begun"),
        ("foreign", "federated/ledger: holds chain somebody-else, this run's is"),
        ("newer", "federated/ledger: written by a newer version of capsfl (block.v9, this one reads block.v2)"),
    ],
)
def test_where_there_is_nothing_to_audit_verify_says_so_in_one_line_and_exit_code_2(begun, capsys, case, message):
    folder, config = begun
    place, owner = folder / "federated" / "ledger", Signer.generate()
    chain_id = "somebody-else" if case == "foreign" else chain_of(config, "federated")
    if case != "none":
        place.parent.mkdir()
        Ledger.create(place, signer=owner, chain_id=chain_id).close()
    if case == "newer":
        payload = read_frame(io.BytesIO((place / "log").read_bytes()))
        assert payload is not None
        (place / "log").write_bytes(frame(payload.replace(b"block.v2", b"block.v9")))
    with pytest.raises(SystemExit) as end:
        main(["verify", str(folder)])
    assert end.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1
    assert message in error
