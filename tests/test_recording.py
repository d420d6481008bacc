"""A round is recorded while the next one computes: in order, one at a time, and no error of it gets lost.

What a kill between a checkpoint and the manifest of its files leaves is signed or refused when the run goes on.
"""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from capsfl import cli
from capsfl.audit import audit_run
from capsfl.checkpoint import CheckpointError, open_checkpoints, read_step
from capsfl.commands import train
from capsfl.config import ArmConfig, ClassificationStage, StudyConfig
from capsfl.ct.phantom import PhantomConfig
from capsfl.curves import MetricsLog
from capsfl.federated.federation import RoundReport
from capsfl.federated.round import RoundState
from capsfl.ledger import Finding, Ledger, Registration, Signer, Status, chain_binding
from capsfl.ledger.manifests import Manifest
from capsfl.privacy.patient_plan import Stage
from capsfl.privacy.plan import PrivacyPlan
from capsfl.recording import RoundKeeper, manifest_place, one_behind


@pytest.mark.parametrize("threaded", [True, False])
def test_calls_are_done_in_order_and_all_of_them_by_the_end(threaded: bool):
    done: list[int] = []
    with one_behind(threaded=threaded) as behind:
        for number in range(20):
            behind(done.append, number)
            assert done in (list(range(number)), list(range(number + 1)))  # at most one is still at work
    assert done == list(range(20))


def test_the_caller_goes_on_while_a_call_works_and_waits_before_the_next():
    gate, done = threading.Event(), []
    with one_behind() as behind:
        behind(lambda: done.append(gate.wait(60)))
        assert done == []  # the caller is here, the call is not through
        gate.set()
        behind(done.append, "next")
        assert done[0] is True
    assert done == [True, "next"]


def fail(words: str) -> None:
    raise ValueError(words)


def rounds(*calls: tuple[Callable[..., None], object], ending: BaseException | None = None) -> None:
    """Makes these calls one behind, and then raises."""
    with one_behind() as behind:
        for function, argument in calls:
            behind(function, argument)
        if ending is not None:
            raise ending


def test_what_a_call_raises_comes_up_at_the_next_call_which_is_not_made():
    done: list[object] = []
    with pytest.raises(ValueError, match="disk full") as raised:
        rounds((fail, "disk full"), (done.append, 1))
    assert done == []
    assert not hasattr(raised.value, "__notes__")  # it is itself, and needs no note


def test_what_the_last_call_raises_comes_up_at_the_end():
    with pytest.raises(ValueError, match="disk full"):
        rounds((fail, "disk full"))


def test_what_the_body_raises_comes_with_what_the_last_call_raised():
    with pytest.raises(KeyboardInterrupt) as raised:
        rounds((fail, "disk full"), ending=KeyboardInterrupt())
    assert raised.value.__notes__ == ["the round before was not recorded: ValueError: disk full"]


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        (ValueError("bad labels"), "bad labels"),
        (OSError("the device is gone"), "the device is gone"),
        (KeyboardInterrupt(), "interrupted; run the same command again to resume"),
    ],
)
def test_the_command_line_says_both_in_one_line(monkeypatch, capsys, ending: BaseException, line: str):
    def command(_: list[str]) -> int:
        rounds((fail, "disk full"), ending=ending)
        return 0

    monkeypatch.setattr(train, "run", command)
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert capsys.readouterr().err == f"{line}; the round before was not recorded: ValueError: disk full\n"


def test_what_the_body_raises_after_a_call_that_worked_comes_alone_and_the_call_is_done():
    done: list[object] = []
    with pytest.raises(RuntimeError, match="device lost") as raised:
        rounds((done.append, 1), ending=RuntimeError("device lost"))
    assert done == [1]
    assert not hasattr(raised.value, "__notes__")


OWNER, CHAIN, TASK = Signer((7).to_bytes(32, "big")), "chain", "classification"
OPTIMIZER = optax.adam(0.1)
CONFIG = StudyConfig(phantom=PhantomConfig(), classification=ClassificationStage(rounds=3)).arm(ArmConfig())
PLAN = PrivacyPlan.build(CONFIG.privacy, num_hospitals=2, stages=[Stage(TASK, 3, 1, ())])


def state_after(rounds: int) -> RoundState:
    """Weights and a server's Adam after some rounds."""
    weights = {"w": jnp.arange(3, dtype=jnp.float32)}
    server = OPTIMIZER.init(weights)
    for _ in range(rounds):
        change, server = OPTIMIZER.update(weights, server)
        weights = optax.apply_updates(weights, change)
    return RoundState(weights, server, jnp.int32(rounds))


def keep(folder: Path, *numbers: int) -> RoundState | None:
    """Resumes a run as `capsfl train` does, and keeps the rounds of these numbers; returns what it resumed from."""
    place = folder / "ledger"
    if Ledger.exists(place):
        ledger = Ledger.open(place, OWNER)
    else:
        binding = chain_binding(CHAIN, OWNER.public_key)
        joined = [
            Registration.of(Signer(bytes([*bytes(31), 9 + number])), name, "lung CT", 4, binding)
            for number, name in enumerate("AB")
        ]
        ledger = Ledger.create(place, signer=OWNER, chain_id=CHAIN, registrations=joined)
    metrics = MetricsLog(folder / "metrics.jsonl", member=None)
    with ledger, open_checkpoints(folder / "checkpoints" / TASK) as checkpoints:
        keeper = RoundKeeper(CONFIG, TASK, folder, ledger, metrics, checkpoints, PLAN, jax.random.key(5))
        resumed = keeper.resume(state_after(0))
        for number in numbers:
            keeper.keep(state_after(number), RoundReport(number, ("A", "B"), 0.5), {}, {}, number)
    return resumed


def manifest_findings(folder: Path, number: int) -> list[Finding]:
    findings = audit_run(folder, CONFIG, chain_id=CHAIN)
    return [f for f in findings if f.check == "manifest" and f.round == number]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds, killed after it has saved the second one and before it has signed that one's files."""
    folder = tmp_path_factory.mktemp("run")
    keep(folder, 1)

    def killed(*_: object) -> None:
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundKeeper, "_sign_files", killed)
        patch.setattr(RoundKeeper, "_check_manifest", lambda *_: None)
        with pytest.raises(InterruptedError):
            keep(folder, 2)
    return folder


def rewrite(step: Path, *, moment: float) -> None:
    """Writes a step again with another first moment of the server's Adam, and digests that fit it."""
    with ocp.StandardCheckpointer() as files:
        tree = files.restore(step / "state")
        tree["server"]["0.mu.w"] = np.full(3, moment, np.float32)
        shutil.rmtree(step / "state")
        files.save(step / "state", tree)
    found = read_step(step.parent, int(step.name))
    (place,) = (step / "digests").glob("metadata")
    place.write_text(json.dumps(found.digests))


def test_what_a_kill_leaves_before_its_files_are_signed_verifies_and_is_signed_when_the_run_goes_on(
    kept: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(kept, tmp_path / "run"))
    place = manifest_place(folder, TASK, 2)
    assert json.loads(place.read_text())["files"] == []
    (finding,) = manifest_findings(folder, 2)
    assert (finding.status, finding.detail) == (Status.OK, "holds what was signed before it was saved")
    resumed = keep(folder, 3)
    assert resumed is not None
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, resumed, state_after(2))))
    assert json.loads(place.read_text())["files"]
    for number in (1, 2, 3):
        (finding,) = manifest_findings(folder, number)
        assert (finding.status, finding.detail) == (Status.OK, "as written")


@pytest.mark.parametrize("when", ["before its files are signed", "at any later time"])
def test_an_optimizer_that_somebody_changes_is_refused_though_its_digests_fit(kept: Path, tmp_path: Path, when: str):
    folder = Path(shutil.copytree(kept, tmp_path / "run"))
    if when == "at any later time":
        keep(folder)
    step, place = folder / "checkpoints" / TASK / "2", manifest_place(folder, TASK, 2)
    signed = place.read_bytes()
    rewrite(step, moment=1e6)
    (finding,) = manifest_findings(folder, 2)
    assert finding.status is Status.FAILED
    assert finding.detail == "what it holds beside the model is not what was signed"
    with pytest.raises(CheckpointError, match=r"2: what it holds beside the weights is not what was signed; delete"):
        keep(folder, 3)
    assert place.read_bytes() == signed
    shutil.rmtree(step)
    resumed = keep(folder, 2, 3)
    assert resumed is not None
    assert int(resumed.round) == 1
    assert [finding.status for number in (1, 2, 3) for finding in manifest_findings(folder, number)] == [Status.OK] * 3


def test_the_same_state_written_again_is_a_warning_and_no_reason_to_stop(kept: Path, tmp_path: Path):
    folder = Path(shutil.copytree(kept, tmp_path / "run"))
    keep(folder)
    (folder / "checkpoints" / TASK / "2" / "note.txt").write_text("by somebody")
    (finding,) = manifest_findings(folder, 2)
    assert (finding.status, finding.leaf) == (Status.WARNING, "note.txt")
    assert finding.detail.endswith("though all that it holds agrees")
    assert keep(folder) is not None


def test_nothing_is_signed_of_a_step_without_a_manifest_and_a_damaged_manifest_is_named(kept: Path, tmp_path: Path):
    folder = Path(shutil.copytree(kept, tmp_path / "run"))
    place = manifest_place(folder, TASK, 2)
    data = place.read_bytes()
    place.write_bytes(data.replace(b'"round":2', b'"round":1'))
    with pytest.raises(
        CheckpointError, match=r"2\.json: the manifest is that of another round.*; delete .*/2 to resume"
    ):
        keep(folder)
    place.unlink()
    assert keep(folder) is not None
    assert not place.exists()
    (finding,) = manifest_findings(folder, 2)
    assert finding.status is Status.UNVERIFIABLE


def test_a_manifest_of_an_older_version_has_no_digest_of_the_contents_and_still_verifies(kept: Path, tmp_path: Path):
    folder = Path(shutil.copytree(kept, tmp_path / "run"))
    place = manifest_place(folder, TASK, 1)
    with Ledger.open(folder / "ledger") as ledger:
        record, binding = ledger.rounds()[0], ledger.index.binding
    manifest = Manifest.decode(place.read_bytes())
    place.write_bytes(replace(manifest, contents=None).signed(OWNER, binding).encode())
    assert b"contents" not in place.read_bytes()
    Manifest.decode(place.read_bytes()).check(record, OWNER.public_key, binding)
    assert [finding.status for finding in manifest_findings(folder, 1)] == [Status.OK]
    shutil.rmtree(folder / "checkpoints" / TASK / "2")
    assert keep(folder) is not None
