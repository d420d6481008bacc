"""A run that is stopped goes on with other hospitals: as far as it may, and in sight of the ledger."""

import csv
import os
from pathlib import Path

import pytest

from capsfl.federated.federation import Federation
from capsfl.federated.round import RoundState
from capsfl.ledger.chain import Ledger

pytestmark = [
    pytest.mark.journey,
    pytest.mark.torture,
    pytest.mark.skipif("CAPSFL_TORTURE" not in os.environ, reason="a minute of a processor; run by `make torture`"),
]

STUDY = """
out = "{out}"
seed = 3
places = 3

[data]
source = "{manifest}"
root = "{root}"
field = [16, 32, 32]

[segmentation]
rounds = 2
crop = 16
crops_per_plane = 2
planes = ["xy"]
model = {{ width = 0.13, num_iters = 1 }}
local = {{ optimizer = "sgd", learning_rate = 0.01, batch_size = 4 }}

[privacy]
clip_norm = 1.0
noise_multiplier = 0.5

[devices]
chunk = 1
"""


def test_a_hospital_joins_and_another_leaves_a_stopped_run(
    phantom: Path, tmp_path: Path, here, refused, monkeypatch: pytest.MonkeyPatch
):
    manifest, config, run = tmp_path / "manifest.csv", tmp_path / "study.toml", tmp_path / "run"
    config.write_text(STUDY.format(out=run, manifest=manifest, root=phantom))
    with (phantom / "manifest.csv").open() as stream:
        rows = list(csv.DictReader(stream))

    def take_part(*hospitals: str) -> None:
        # Patients who are never trained on stay, so that there is something to score on.
        with manifest.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(r for r in rows if r["hospital"] in hospitals or r["split"] in ("test", "validation"))

    step = Federation.step

    def stop_in_round_two(self: Federation, state: RoundState) -> object:
        if int(state.round) == 1:
            raise ValueError("the power fails")
        return step(self, state)

    take_part("hospital-A", "hospital-B")
    with monkeypatch.context() as patch:
        patch.setattr(Federation, "step", stop_in_round_two)
        assert refused("train", config) == "the power fails"

    take_part("hospital-B", "hospital-C")
    assert here("train", config).code == 0
    with Ledger.open(run / "federated" / "ledger") as ledger:
        records = [record for block in ledger.blocks() for record in block.records]
        first, second = ledger.rounds()
    assert [record.type for record in records] == [
        "genesis", "registration", "registration", "round", "registration", "revocation", "round",
    ]  # fmt: skip
    assert set(first.cohort) == {"hospital-A", "hospital-B"}
    assert set(second.cohort) == {"hospital-B", "hospital-C"}
    assert float(first.expected_cohort or 0) == float(second.expected_cohort or 0) == 3
    assert here("verify", run).code == 0

    take_part("hospital-A", "hospital-B", "hospital-C")
    (run / "federated" / "results.json").unlink()
    assert "hospital-A has left this run and its key is revoked" in refused("train", config)
