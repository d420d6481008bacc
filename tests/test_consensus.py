"""Hospitals of a run decide together: who poisons is out-voted by name, and ballots and model agree on the weights."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.audit import audit_run, chain_of
from capsfl.cli import main
from capsfl.config import ArmConfig, StudyConfig
from capsfl.consensus import caution_of_votes
from capsfl.curves import MetricsLog
from capsfl.digests import file_digests, update_digest
from capsfl.federated.federation import Federation, RoundReport
from capsfl.federated.hospitals import stack_hospitals
from capsfl.federated.updates import CohortUpdates
from capsfl.federated.votes import weigh
from capsfl.learning.tasks import Task, make_task
from capsfl.ledger import Ledger, Registration, opens
from capsfl.ledger.canonical import decimal
from capsfl.ledger.consensus import ConsensusRules, decide, quantize
from capsfl.ledger.errors import Divergence, LedgerError
from capsfl.ledger.keyfiles import open_key
from capsfl.ledger.keys import chain_binding
from capsfl.ledger.records import RoundRecord
from capsfl.ledger.statements import Ballot, Commitment, commit
from capsfl.ledger.verify import Finding, Status
from capsfl.profiling import RoundTrace
from capsfl.recording import HospitalKeys, RoundKeeper, append_round
from capsfl.study import Split, StudyFolder
from capsfl.training.checks import cautions_of, check_before_training
from capsfl.training.founding import open_ledger
from capsfl.training.rounds import run_rounds
from capsfl.training.run import Run, plan_of_run, plan_runs

NAMES = ("ash", "birch", "cedar", "dogwood", "elm")
ROUNDS = 3


class Line(nnx.Module):
    """A score from 0 to 1 that grows along the weights."""

    def __init__(self) -> None:
        self.weights = nnx.Param(jnp.zeros(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        return 0.5 + x @ self.weights[...]


def line_task() -> Task:
    """Least squares times the record's `lie`, so that a hospital can hand over any multiple of its update."""

    def loss(model: Any, batch: Any) -> jax.Array:
        return 0.5 * jnp.mean((model(batch["x"]) - batch["y"]) ** 2) * jnp.mean(batch["lie"])

    def error(model: Any, batch: Any) -> jax.Array:
        return jnp.abs(model(batch["x"]) - batch["y"])

    return make_task("classification", Line(), loss, absolute_error=error)


def records(names: tuple[str, ...], poison: Mapping[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """Thirty-two records a hospital, and what a poisoner makes of its own."""
    generator = np.random.default_rng(2)
    found = {}
    for name in names:
        x = generator.normal(size=(32, 4)).astype(np.float32)
        y = np.clip(0.5 + x @ [0.2, -0.1, 0.15, -0.25] + 0.1 * generator.normal(size=32), 0, 1).astype(np.float32)
        lie = {"sign flip": -1.0, "noise": 20.0}.get(poison.get(name, ""), 1.0)
        if poison.get(name) == "label flip":
            y = 1 - y
        if poison.get(name) == "noise":
            y = generator.uniform(size=32).astype(np.float32)
        found[name] = {"x": x, "y": y, "lie": np.full(32, lie, np.float32)}
    return found


def error_of(weights: np.ndarray, names: tuple[str, ...] = NAMES) -> float:
    rows = records(names, {}).values()
    return float(np.mean([np.abs(0.5 + row["x"] @ weights - row["y"]).clip(0, 1).mean() for row in rows]))


@dataclass(frozen=True)
class Holder:
    """What founding a ledger asks of a patient."""

    hospital: str
    truth: np.ndarray = field(default_factory=lambda: np.ones(1, bool))
    truth_outside: int = 0
    label: int = 0

    @property
    def whose(self) -> tuple[str, str]:
        return self.hospital, "patient"


@dataclass(frozen=True)
class Trained:
    """What a run leaves."""

    place: Run
    weights: np.ndarray
    ledger: Ledger
    findings: list[Finding]

    @property
    def folder(self) -> Path:
        return self.place.folder

    @property
    def config(self) -> StudyConfig:
        return self.place.config

    @property
    def chain(self) -> str:
        return self.place.chain_id

    def names(self) -> dict[str, str]:
        blocks = self.ledger.blocks()
        return {r.hospital_id: r.name for r in blocks[0].records if isinstance(r, Registration)}

    def shares(self, number: int) -> dict[str, float]:
        """The weights of a round's decision by the hospitals' names."""
        decision = self.ledger.index.decisions["classification", number]
        return {self.names()[member]: float(share or 0) for member, share in decision.weights}

    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status is Status.FAILED]


def configuration(**changes: Any) -> StudyConfig:
    stage = {
        "rounds": ROUNDS,
        "local": {"optimizer": "sgd", "learning_rate": 0.5, "batch_size": 32},
        "aggregation": {"rule": "mae_votes", "margin": 0.1},
    }
    table = {
        "phantom": {},
        "classification": stage | changes.pop("stage", {}),
        "privacy": {"clip_norm": 100.0},
        "consensus": {},
        "devices": {"chunk": 1},
    }
    return StudyConfig.model_validate_json(json.dumps(table | changes))


def run(folder: Path, poison: Mapping[str, str], names: tuple[str, ...] = NAMES, **changes: Any) -> Trained:
    """Trains and audits a study of one run through the functions of `capsfl train`."""
    config = configuration(out=str(folder), **changes)
    with StudyFolder.open(config):
        pass
    chain = chain_of(config, "federated")
    place = Run(folder / "federated", config.arm(ArmConfig()), ArmConfig(), names, chain)
    weights = rounds_of(place, poison)
    findings = audit_run(place.folder, place.config, chain_id=chain)
    return Trained(place, weights, Ledger.open(place.folder / "ledger"), findings)


def split_of(names: tuple[str, ...]) -> Split:
    """A patient a hospital, all trained on, the first one tested on too."""
    holders = tuple(Holder(name) for name in names)
    return Split(holders, (), holders[:1])  # pyright: ignore[reportArgumentType]


def rounds_of(place: Run, poison: Mapping[str, str]) -> np.ndarray:
    """Runs or resumes the rounds of a run; returns its last weights."""
    split, stage = split_of(place.hospitals), place.config.classification
    assert stage is not None
    with open_ledger(place, split) as ledger:
        metrics = MetricsLog(place.folder / "metrics.jsonl", member=None)
        weights, *_ = run_rounds(
            place, line_task(), stage, records(place.hospitals, poison), {}, ledger, metrics, RoundTrace(None),
            plan=plan_of_run(place, split), rounds_before=0,
        )  # fmt: skip
    return np.asarray(jax.tree.leaves(weights)[0])


def verified(study: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and words of `capsfl verify`."""
    with pytest.raises(SystemExit) as end:
        main(["verify", str(study), *words])
    return int(end.value.code or 0), capsys.readouterr().out


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Five honest hospitals."""
    return run(tmp_path_factory.mktemp("clean"), {})


def test_a_round_is_committed_countersigned_voted_on_decided_approved_and_verified(clean: Trained):
    kinds = [[record.type for record in block.records] for block in clean.ledger.blocks()]
    assert kinds[0] == ["genesis", "rules"] + ["registration"] * 5
    assert kinds[1:] == [["commitment"] * 5 + ["ballot"] * 5 + ["decision", "round"]] * ROUNDS
    assert all(len(block.approvals) == 5 for block in clean.ledger.blocks()[1:])
    assert clean.failed() == []
    found = {finding.check: finding for finding in clean.findings if finding.round == ROUNDS or finding.round is None}
    assert found["votes"].status is Status.UNVERIFIABLE
    for check in ("rules", "manifest", "approvals", "statements"):
        assert found[check].status is Status.OK
    (last,) = (f for f in clean.findings if f.check == "votes" and f.round == ROUNDS)
    assert last.detail == "5 ballots give this decision and its weights again; out-voted: nobody"
    assert error_of(clean.weights) < 0.5 * error_of(np.zeros(4))
    rows = [json.loads(line) for line in (clean.folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["vote_weights"] == pytest.approx(clean.shares(row["round"]), abs=1e-5)


def test_commitments_open_with_the_hospitals_salts_and_the_updates_of_the_same_rounds(clean: Trained):
    stage = clean.config.classification
    assert stage is not None
    federation = Federation(
        line_task(), stack_hospitals(records(NAMES, {})), config=stage, privacy=clean.config.privacy,
        devices=clean.config.devices, stream="federated", keep_updates=True,
    )  # fmt: skip
    _, report = federation.step(federation.init())
    assert report.updates is not None
    updates = {name: update_digest(update) for name, update in report.updates.on_host().items()}
    signers = HospitalKeys(clean.folder / "keys", open_key).signers()
    genesis = clean.ledger.blocks()[0].records[0]
    binding = chain_binding(clean.chain, genesis.public_key)  # pyright: ignore[reportAttributeAccessIssue]
    commitments = clean.ledger.index.commitments["classification", 1]
    assert len(commitments) == len(set(updates.values())) == 5
    for commitment in commitments:
        name = clean.names()[commitment.hospital]
        salt = commit(signers[commitment.hospital], binding, "classification", 1, updates[name])[2]
        assert opens(commitment, salt, updates[name])
        assert not opens(commitment, salt, updates["ash" if name != "ash" else "elm"])


@pytest.mark.parametrize("attack", ["label flip", "sign flip", "noise"])
def test_who_poisons_among_five_is_out_voted_by_name_and_the_model_stays_near_the_clean_one(
    tmp_path: Path, clean: Trained, attack: str
):
    poisoned = run(tmp_path, {"cedar": attack}, stage={"aggregation": {"rule": "mae_votes", "byzantine": 1}})
    assert poisoned.failed() == []
    for number in range(1, ROUNDS + 1):
        assert poisoned.shares(number).keys() == set(NAMES) - {"cedar"}
        (finding,) = (f for f in poisoned.findings if f.check == "votes" and f.round == number)
        assert finding.detail.endswith("out-voted: cedar")
    assert error_of(poisoned.weights) < 1.1 * error_of(clean.weights)


def test_of_three_hospitals_one_that_poisons_decides_and_both_the_run_and_the_audit_say_so(
    tmp_path: Path, clean: Trained, capsys: pytest.CaptureFixture[str]
):
    three = NAMES[:3]
    poisoned = run(tmp_path, {"cedar": "label flip"}, three)
    assert poisoned.failed() == []
    shares = [poisoned.shares(number) for number in range(1, ROUNDS + 1)]
    assert any(share.get("cedar", 0) > 0.3 for share in shares), shares
    assert error_of(poisoned.weights) > 1.5 * error_of(clean.weights)
    (finding,) = (f for f in poisoned.findings if f.check == "votes" and f.round == 1)
    assert finding.status is Status.WARNING
    assert "a model with 2 votes, where one false voter decides" in finding.detail
    code, text = verified(tmp_path, capsys=capsys)
    assert code == 0
    assert "a model with 2 votes, where one false voter decides" in text
    (caution,) = cautions_of([poisoned.place], split_of(three))
    assert "of 3 hospitals a round each model is judged by 2" in caution
    assert caution_of_votes(poisoned.config.stages, 4) is None
    assert caution_of_votes(configuration(stage={"aggregation": {}}).stages, 3) is None


def test_the_caution_is_about_who_votes_in_a_round_and_not_about_all_hospitals(clean: Trained):
    sampled = configuration(privacy={"clip_norm": 100.0, "sampler": "fixed", "cohort": 3})
    few = replace(clean.place, config=sampled.arm(ArmConfig()))
    (caution,) = cautions_of([few], split_of(NAMES))
    assert "of 3 hospitals a round each model is judged by 2" in caution
    assert cautions_of([clean.place], split_of(NAMES)) == ()


def left_out(clean: Trained, folder: Path, kinds: tuple[type, ...], quorum: str) -> list[Finding]:
    """What the audit says of a copy whose owner wrote the chain again, with records of these kinds alone."""
    copy = Path(shutil.copytree(clean.folder, folder / "copy"))
    shutil.rmtree(copy / "ledger")
    first, *blocks = clean.ledger.blocks()
    joined = [record for record in first.records if isinstance(record, Registration)]
    rules = replace(clean.ledger.index.rules, quorum=quorum)
    config = configuration(consensus={"quorum": quorum}).arm(ArmConfig())
    owner, keys = open_key(copy / "keys" / "owner.pem"), HospitalKeys(copy / "keys", open_key)
    with Ledger.create(
        copy / "ledger", signer=owner, chain_id=clean.chain, registrations=joined, rules=rules
    ) as ledger:
        for block in blocks:
            ledger.approvers = keys.approvers
            ledger.append(*(r for r in block.records if isinstance(r, kinds)))
    return [f for f in audit_run(copy, config, chain_id=clean.chain) if f.check == "statements"]


def test_an_owner_who_leaves_out_the_votes_or_the_commitments_is_found_out(clean: Trained, tmp_path: Path):
    findings = left_out(clean, tmp_path / "a", (Commitment, RoundRecord), "two_thirds")
    assert [finding.status for finding in findings] == [Status.FAILED] * ROUNDS
    assert findings[0].detail.startswith("no ballots and no decision")
    findings = left_out(clean, tmp_path / "b", (RoundRecord,), "owner")
    assert [(f.status, f.detail, f.round) for f in findings] == [
        (Status.FAILED, "no commitment of ash and 4 more", number) for number in range(1, ROUNDS + 1)
    ]


def test_ballots_that_were_to_stay_out_of_the_ledger_are_found(clean: Trained):
    config = configuration(consensus={"ballots": False}).arm(ArmConfig())
    findings = [f for f in audit_run(clean.folder, config, chain_id=clean.chain) if f.check == "statements"]
    assert {(f.status, f.detail) for f in findings} == {
        (Status.FAILED, "has ballots, which the configuration keeps out of the ledger")
    }


def test_an_honest_run_passes_a_strict_audit_and_a_tampered_one_does_not(
    clean: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, text = verified(clean.folder.parent, "--strict", capsys=capsys)
    assert code == 0, text
    assert "they open with a hospital's salt and update only" in text
    copy = Path(shutil.copytree(clean.folder.parent, tmp_path / "copy"))
    (copy / "federated" / "manifests" / "classification" / "2.json").unlink()
    assert verified(copy, capsys=capsys)[0] == 0
    assert verified(copy, "--strict", capsys=capsys)[0] == 1


def test_a_crowd_whose_statements_no_block_holds_is_refused_before_training(tmp_path: Path):
    def check(count: int, **changes: Any) -> None:
        config, split = configuration(**changes), split_of(tuple(f"hospital-{n}" for n in range(count)))
        check_before_training(config, split, plan_runs(config, tmp_path, split))

    check(90)
    with pytest.raises(
        ValueError, match=r"^classification\.aggregation\.rule .* the ballots of 120 of 120 "
    ) as refusal:
        check(120)
    assert "set consensus.ballots = false" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    check(120, consensus={"ballots": False})
    check(120, privacy={"clip_norm": 100.0, "sampler": "fixed", "cohort": 40})
    with pytest.raises(ValueError, match=r"the commitments and approvals of 1200 .* leave \[consensus\] out"):
        check(1200, consensus={"ballots": False})


def test_a_deleted_step_that_is_trained_again_leaves_no_manifest_of_its_old_files(
    clean: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = replace(clean.place, folder=Path(shutil.copytree(clean.folder, tmp_path / "copy")))
    manifest = copy.folder / "manifests" / "classification" / f"{ROUNDS}.json"
    whole = json.loads(manifest.read_text())
    shutil.rmtree(copy.folder / "checkpoints" / "classification" / f"{ROUNDS}")

    def killed(*_: Any) -> None:
        raise InterruptedError("between checkpoint and manifest")

    with monkeypatch.context() as patch:
        patch.setattr(RoundKeeper, "_sign_files", killed)
        with pytest.raises(InterruptedError):
            rounds_of(copy, {})
    assert (copy.folder / "checkpoints" / "classification" / f"{ROUNDS}").is_dir()
    before = json.loads(manifest.read_text())
    assert (before["files"], before["contents"]) == ([], whole["contents"])
    assert [f for f in audit_run(copy.folder, copy.config, chain_id=clean.chain) if f.doubtful] == []
    rounds_of(copy, {})
    after = json.loads(manifest.read_text())
    assert dict(after["files"]) == file_digests(copy.folder / "checkpoints" / "classification" / f"{ROUNDS}")
    assert [f for f in audit_run(copy.folder, copy.config, chain_id=clean.chain) if f.doubtful] == []


def _report(clean: Trained, number: int) -> Any:
    """The report of a round that the ledger does not know yet, with updates out of nothing."""
    stack = {"w": np.arange(5, dtype=np.float32)[:, None]}
    votes = {voter: {name: 0.25 for name in NAMES if name != voter} for voter in NAMES}
    return RoundReport(
        number, NAMES, 0.1, votes=votes, vote_weights=dict.fromkeys(NAMES, 0.2),
        updates=CohortUpdates(stack, {name: place for place, name in enumerate(NAMES)}),
    )  # fmt: skip


def test_weights_that_are_not_those_of_the_ballots_and_another_update_of_a_recorded_round_are_divergences(
    clean: Trained, tmp_path: Path
):
    copy = Path(shutil.copytree(clean.folder, tmp_path / "copy"))
    keys = HospitalKeys(copy / "keys", open_key)
    with Ledger.open(copy / "ledger", open_key(copy / "keys" / "owner.pem")) as ledger:
        ledger.approvers = keys.approvers
        record, report = replace(ledger.rounds()[-1], round=ROUNDS + 1), _report(clean, ROUNDS + 1)
        whitewashed = replace(report, vote_weights={"ash": 0.3, "birch": 0.1, "cedar": 0.2, "dogwood": 0.2, "elm": 0.2})
        with pytest.raises(Divergence, match=r"ash weighs 0\.300000 in the model, and 0\.200000 by the ballots"):
            append_round(ledger, record, whitewashed, keys, ballots=True)
        append_round(ledger, record, report, keys, ballots=True)
        head = ledger.head()
        append_round(ledger, record, report, keys, ballots=True)  # as after a crash between ledger and checkpoint
        assert ledger.head() == head
        report.updates.stack["w"][0] = 9
        with pytest.raises(Divergence, match="round 4: what its hospitals signed is not what is recorded"):
            append_round(ledger, record, report, keys, ballots=True)
        (copy / "keys" / "holder-elm.pem").unlink()
        lonely = HospitalKeys(copy / "keys", open_key)
        late = _report(clean, ROUNDS + 2)
        with pytest.raises(LedgerError, match=r"no key for .*: put its key file back"):
            append_round(ledger, replace(record, round=ROUNDS + 2), late, lonely, ballots=True)
        assert ledger.head() == head


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_device_and_the_ledger_come_to_one_decision_and_the_same_weights(data: Any):
    slots, decimals = 6, data.draw(st.integers(1, 4))
    steps = 10**decimals
    rows = data.draw(
        st.lists(st.lists(st.integers(-1, steps), min_size=slots, max_size=slots), min_size=slots, max_size=slots)
    )
    votes = np.array([[np.nan if whole < 0 else whole / steps for whole in row] for row in rows], np.float32)
    np.fill_diagonal(votes, np.nan)
    byzantine, gamma = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([0.0, 0.7, 1.0, 12.0]))
    margin = data.draw(st.none() | st.integers(0, 100).map(lambda percent: percent / 100))
    shares = np.asarray(
        weigh(jnp.asarray(votes), jnp.ones(slots, bool), byzantine=byzantine, gamma=gamma, margin=margin, steps=steps)
    )
    ids = [f"{place:064x}" for place in range(slots)]
    ballots = [
        Ballot(
            "t", 1, voter, tuple((c, quantize(float(e))) for c, e in zip(ids, row, strict=True) if c != voter), "0" * 32
        )
        for voter, row in zip(ids, votes, strict=True)
    ]
    rules = ConsensusRules(
        gamma=decimal(gamma), margin=None if margin is None else decimal(margin), byzantine=byzantine
    )
    _, weights = decide(rules, ballots, ids)
    found = {member: float(share or 0) for member, share in weights}
    assert [place for place in range(slots) if shares[place] > 0] == [ids.index(member) for member in found]
    assert shares[shares > 0] == pytest.approx(list(found.values()), rel=1e-4)


@pytest.mark.parametrize(
    ("aggregation", "message"),
    [
        ({"rule": "mean", "secure": True}, r"classification\.aggregation\.secure = true: hands over sums only"),
        ({"rule": "mean", "dropout": 0.1}, r"classification\.aggregation\.dropout = 0\.1: who drops out"),
    ],
)
def test_what_hospitals_cannot_sign_is_refused_by_field(aggregation: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        configuration(stage={"aggregation": aggregation})


def test_two_stages_that_vote_by_other_rules_have_no_chain_in_common():
    segmentation = {"aggregation": {"rule": "mae_votes", "gamma": 2.0}}
    with pytest.raises(ValueError, match=r"segmentation\.aggregation and classification\.aggregation: a chain has one"):
        configuration(segmentation=segmentation)
    configuration(segmentation=segmentation, consensus={"ballots": False})


def test_rules_other_than_the_configuration_s_are_named(clean: Trained):
    config = configuration(consensus={"quorum": "all"}).arm(ArmConfig())
    (finding,) = (f for f in audit_run(clean.folder, config, chain_id=clean.chain) if f.check == "rules")
    assert finding.status is Status.FAILED
    assert "quorum=two_thirds" in finding.detail
    assert "quorum=all" in finding.detail
    without = configuration(consensus=None).arm(ArmConfig())
    (finding,) = (f for f in audit_run(clean.folder, without, chain_id=clean.chain) if f.check == "rules")
    assert "the configuration none" in finding.detail


def test_a_pool_and_a_hospital_alone_have_nobody_to_decide_with():
    for partition in ("pooled", "local"):
        arm = ArmConfig(partition=partition)  # pyright: ignore[reportArgumentType]
        assert configuration().arm(arm).consensus is None


def test_files_written_again_are_a_warning(clean: Trained, tmp_path: Path):
    copy = Path(shutil.copytree(clean.folder, tmp_path / "copy"))
    (copy / "checkpoints" / "classification" / "2" / "note.txt").write_text("by somebody")
    (finding,) = (f for f in audit_run(copy, clean.config, chain_id=clean.chain) if f.status is Status.WARNING)
    assert (finding.check, finding.round, finding.leaf) == ("manifest", 2, "note.txt")
    (copy / "manifests" / "classification" / "2.json").unlink()
    (finding,) = (
        f for f in audit_run(copy, clean.config, chain_id=clean.chain) if f.check == "manifest" and f.round == 2
    )
    assert finding.status is Status.UNVERIFIABLE
