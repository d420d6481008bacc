"""A study's models taken away: what lies in the folder is what the ledger vouches for, and runs without capsfl."""

import hashlib
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from safetensors import safe_open

from capsfl.checkpoint import latest_parameters, read_parameters, tensor_leaves
from capsfl.config import StudyConfig
from capsfl.export.program import run_program
from capsfl.learning.classification import Classifier, make_classification_task
from capsfl.ledger.chain import Ledger
from capsfl.ledger.records import parameters_root
from capsfl.study import load_study_config

pytestmark = pytest.mark.journey


def test_models_taken_away_are_those_of_the_ledger_and_run_without_capsfl(study, tmp_path: Path, here):
    out = tmp_path / "models"
    assert "MODEL_CARD.md" in here("export", study.run, out).out
    card = (out / "MODEL_CARD.md").read_text()
    run, config = study.run / "federated", load_study_config(study.run)
    assert not list(tmp_path.glob(".*")), "a draft is left behind"

    with Ledger.open(run / "ledger") as ledger:
        rounds, head = ledger.rounds(), ledger.blocks()[-1].hash().hex()
    assert head in card
    for name in ("segmentation", "classification"):
        last = max((record for record in rounds if record.task == name), key=lambda record: record.round)
        expected = read_parameters(run / "checkpoints" / name, last.round)
        with safe_open(out / name / "weights.safetensors", framework="numpy") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            assert file.metadata()["digest"] == last.parameters_digest
        assert expected is not None
        assert weights.keys() == expected.keys()
        assert parameters_root(tensor_leaves(weights)) == last.parameters_digest
        assert f"`{last.parameters_digest}`" in card

    files = dict(re.findall(r"\| (\S+/\S+) \| `([0-9a-f]{64})` \|", card))
    assert files.keys() == {str(p.relative_to(out)) for p in out.rglob("*/*")}
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in files.items())

    privacy = json.loads((run / "results.json").read_text())["privacy"]
    for words in ("Not for clinical use", f"epsilon {privacy['epsilon']:.4g} at delta", privacy["accountant"]):
        assert words in card
    _programs_answer_as_the_networks(config, run, out, rounds)


def _programs_answer_as_the_networks(config: StudyConfig, run: Path, out: Path, rounds) -> None:
    numbers = np.random.default_rng(0)
    assert config.classification is not None
    task = make_classification_task(config.classification, seed=config.seed + 1)
    weights = latest_parameters(run / "checkpoints" / task.name, task.parameters, rounds)
    side = config.classification.side
    images = numbers.uniform(0, 1, (2, side, side, 1)).astype(np.float32)
    found = run_program((out / "classification" / "program.stablehlo").read_bytes(), jnp.asarray(images))
    expected = Classifier(task, config.classification).probabilities(weights, images)
    np.testing.assert_allclose(found, expected, atol=1e-5)

    # Each program was asked beside its network when it was made; here, what it takes and gives.
    assert config.data.field is not None
    depth, height, width = config.data.field
    assert height == width
    found = {p.name: export.deserialize(bytearray(p.read_bytes())) for p in (out / "segmentation").glob("*.stablehlo")}
    assert found.keys() == {f"program-{height}x{width}.stablehlo", f"program-{depth}x{width}.stablehlo"}
    for program, rows in zip((found[name] for name in sorted(found)), sorted([depth, height]), strict=True):
        assert str(program.in_avals[0].shape) == f"(batch, {rows}, {width}, 1)"
        assert str(program.out_avals[0].shape) == f"(batch, {rows}, {width})"
        assert {"cpu", "cuda", "tpu"} <= set(program.platforms)


def test_what_cannot_be_taken_away_leaves_nothing(study, study_copy: Path, tmp_path: Path, refused, monkeypatch):
    out = tmp_path / "models"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    assert f"{out}: not empty; name a new folder" in refused("export", study.run, out)
    assert (out / "mine.txt").read_text() == "keep me"
    new = tmp_path / "new"
    (study_copy / "federated" / "results.json").unlink()
    assert "no results.json; let `capsfl train` finish first" in refused("export", study_copy, new)
    assert "no study.json" in refused("export", tmp_path / "nowhere", new)
    monkeypatch.setattr("capsfl.export.run.find_spec", lambda name: None)
    assert "needs safetensors and flatbuffers; pip install 'capsfl[export]'" in refused("export", study.run, new)
    assert not new.exists()
    assert not list(tmp_path.glob(".new*"))
