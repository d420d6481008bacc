"""A sweep through the command line: killed, resumed, looked at; mistakes answered in one line."""

import json
import re
import signal
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from capsfl.learning.classification import ClassificationConfig
from capsfl.learning.segmentation import SegmentationConfig
from capsfl.study import load_study_config
from capsfl.sweeps.problems import StudyProblem, build

CAPSFL = Path(sysconfig.get_path("scripts")) / "capsfl"
SWEEP = """
out = "{out}"

[problem]
kind = "synthetic"
hospitals = 6
records = 8
side = 4
classes = 2
scored = 50
model = {{ hidden = [4] }}

[training]
rounds = 20
local = {{ optimizer = "sgd", learning_rate = 0.1, batch_size = 4 }}

[privacy]
sampler = "fixed"
cohort = 2
clip_norm = 0.5
noise_multiplier = 1.0
delta = 1e-2

[sweep]
seeds = [0, 1, 2, 3]

[sweep.grid]
training.local.learning_rate = [0.05, 0.1, 0.2, 0.3, 0.4]
privacy.clip_norm = [0.1, 0.2, 0.4]

[execution]
width = 1
save_every_s = 0.001
"""
STUDIES = 60


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.format(out=tmp_path / "run"))
    return path


@pytest.mark.journey
def test_a_killed_sweep_goes_on_where_it_was(config: Path, environment: Mapping[str, str], capsfl):
    run = config.parent / "run"
    lines = run / "parts" / "0-of-1.jsonl"
    process = subprocess.Popen([CAPSFL, "sweep", config], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if lines.exists() and lines.read_bytes().count(b"\n") >= 2:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    before = lines.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert 2 <= whole.count(b"\n") < STUDIES

    done = capsfl("sweep", config)
    count = whole.count(b"\n")
    assert f"{STUDIES - count} to run" in done.out
    assert f"{count} finished before" in done.out
    assert lines.read_bytes().startswith(whole)
    rows = [json.loads(line) for line in lines.read_bytes().splitlines()]
    assert sorted(row["study"] for row in rows) == list(range(STUDIES))
    assert {row["status"] for row in rows} == {"finished"}
    for name in ("results.jsonl", "results.csv", "frontier.png", "frontier.svg", "report.html"):
        assert (run / name).stat().st_size > 1000, name
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    capsfl("report", run)
    assert (run / "report.html").read_bytes() == page


@pytest.mark.journey
def test_the_stages_of_a_study_are_problems_of_a_sweep(study):
    """Records as `capsfl train` makes them; scored on validation patients, the test patients left alone."""
    own = load_study_config(study.run)
    assert own.segmentation is not None
    assert own.classification is not None
    sections: dict[str, Any] = {
        name: form(**{field: getattr(getattr(own, name), field) for field in form.model_fields})
        for name, form in (("segmentation", SegmentationConfig), ("classification", ClassificationConfig))
    }
    marked = build(StudyProblem(folder=str(study.run), stage="segmentation", **sections))
    assert marked.utility == "dice"
    assert set(marked.hospitals.names) == {"hospital-A", "hospital-B", "hospital-C"}
    assert marked.held_out.names == ("hospital-A",)  # its first patient is the one to validate on
    side = own.segmentation.crop
    assert marked.hospitals.records["image"].shape[2:4] == (side, side)
    sliced = build(StudyProblem(folder=str(study.run), stage="classification", **sections))
    assert sliced.utility == "accuracy"
    assert sliced.scored == "patients"
    assert sliced.held_out.counts.tolist() == [1], "one patient, not so many slices"
    labels = {int(label) for row, n in zip(sliced.hospitals.records["label"], sliced.hospitals.counts, strict=True)
              for label in row[:n]}  # fmt: skip
    assert labels == {0, 1}
    assert np.abs(sliced.hospitals.records["image"]).max() > 0
    for built in (marked, sliced):
        task = built.make_task(1)
        batch = jax.tree.map(lambda leaf: leaf[0, :2], built.hospitals.records)
        assert jax.eval_shape(task.loss, task.parameters, batch).shape == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a configuration first"),
        (("nowhere.toml",), "nowhere.toml: No such file"),
        (("CONFIG", "--privacy.clip-norm", "-1"), "privacy.clip_norm = -1.0: .*greater than or equal to"),
        (("CONFIG", "--part", "3"), 'execution.part = "3": '),
        (("CONFIG", "--part", "4/4"), "execution.part = 4/4: expected a share"),
        (("CONFIG", "--target-epsilon", "0"), "target_epsilon"),
        (("CONFIG", "--sweep.seeds", "1", "1"), "seeds: 1 is given twice"),
        (("CONFIG", "--privacy.cohort", "7"), "privacy.cohort = 7: .*number of hospitals"),
        (("CONFIG", "--problem.hospital", "7"), "--problem.hospital"),
        (("CONFIG", "--execution.devices", "99"), "execution.devices = 99: there are"),
    ],
)
def test_a_mistake_is_one_line(config: Path, refused, words: tuple[str, ...], message: str):
    said = refused("sweep", *(config if word == "CONFIG" else word for word in words))
    assert re.search(message, said), said
    assert not (config.parent / "run" / "results.jsonl").exists()
