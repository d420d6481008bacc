"""A study whose unit of privacy is the patient, its noise drawn from a secret, through the real command line."""

import json
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from capsfl.ledger.chain import Ledger
from capsfl.ledger.records import RoundRecord

pytestmark = pytest.mark.journey

STUDY = """
out = "{out}"
seed = 3

[data]
source = "{source}"
field = [32, 64, 64]

[segmentation]
rounds = 3
crop = 16
crops_per_plane = 2
planes = ["xy"]
model = {{ name = "unet", width = 2, depth = 2 }}
local = {{ optimizer = "sgd", learning_rate = 0.01 }}

[devices]
chunk = 1

[privacy]
unit = "patient"
expected_patients = 1
clip_norm = 1.0
noise_multiplier = 1.0
delta = 1e-3
target_epsilon = 4.5
noise_key = "secret"
"""


@pytest.fixture(scope="module")
def study(once: Callable[..., Path], capsfl, phantom: Path) -> Path:
    """A finished study; read it, never change it."""

    def build(place: Path) -> None:
        config = place.with_suffix(".toml")
        config.write_text(STUDY.format(out=place, source=phantom / "manifest.csv"))
        capsfl("train", config)

    return once("patients", build)


def rounds_of(study: Path) -> tuple[RoundRecord, ...]:
    with Ledger.open(study / "federated" / "ledger") as ledger:
        return tuple(ledger.rounds())


def test_training_stops_at_the_budget_and_every_hospital_has_its_own_epsilon(study: Path, capsfl):
    privacy = json.loads((study / "federated" / "results.json").read_text())["privacy"]
    assert (privacy["unit"], privacy["relation"], privacy["delta"]) == ("patient", "add_or_remove_one", 1e-3)
    assert privacy["rounds"] == 2, "a third round would exceed the budget"
    rows = privacy["patients"]
    # Two patients of each hospital are trained on; a round has a step for each of them.
    assert [(row["hospital"], row["patients"], row["steps"]) for row in rows] == [
        ("hospital-A", 2, 4), ("hospital-B", 2, 4), ("hospital-C", 2, 4),
    ]  # fmt: skip
    assert privacy["epsilon"] == max(row["epsilon"] for row in rows) <= 4.5
    last = rounds_of(study)[-1]
    assert [name for name, _, _ in last.patients or ()] == [row["hospital"] for row in rows]
    assert float(last.epsilon or 0) == pytest.approx(privacy["epsilon"])
    answer = capsfl("epsilon", "--unit", "patient", "--patients", "2", "--cohort", "1", "--rounds", "2",
                    "--noise-multiplier", "1", "--delta", "1e-3", "--json")  # fmt: skip
    assert json.loads(answer.out)["epsilon"] == pytest.approx(privacy["epsilon"])
    page = (study / "report.html").read_text()
    assert "What each hospital's patients have lost" in page


def test_the_ledger_verifies_with_the_epsilon_of_every_hospital(study: Path, capsfl):
    answer = json.loads(capsfl("verify", study, "--json").out)
    assert answer["ok"] is True
    found = [row for row in answer["runs"]["federated"] if row["check"] == "mechanism"]
    assert [row["status"] for row in found] == ["OK", "OK"]
    assert "the epsilon of the patients of 3 hospitals" in found[0]["detail"]


def test_the_secret_is_in_its_file_alone_and_the_run_resumes_from_it(study: Path, tmp_path: Path, capsfl, refused):
    place = study / "federated" / "keys" / "noise.secret"
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    secret = place.read_text().strip()
    for path in study.rglob("*"):
        if path.is_file() and path != place:
            content = path.read_bytes()
            assert secret.encode() not in content
            assert bytes.fromhex(secret)[:16] not in content

    copy = Path(shutil.copytree(study, tmp_path / "study"))
    config = tmp_path / "study.toml"
    text = study.with_suffix(".toml").read_text()
    config.write_text(re.sub(r'out = ".*"', f'out = "{copy}"', text))
    shutil.rmtree(copy / "federated/checkpoints/segmentation/2")
    (copy / "federated/results.json").unlink()
    # A round run again must reproduce what the ledger recorded, or the run ends with a divergence.
    capsfl("train", config)
    assert rounds_of(copy) == rounds_of(study)
    assert capsfl("verify", copy).code == 0

    (copy / "federated/results.json").unlink()
    (copy / "federated/keys/noise.secret").unlink()
    assert "noise.secret: missing, and the run has rounds" in refused("train", config, "--jobs", "1")
