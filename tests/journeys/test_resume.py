"""A run that is killed and started again ends as if nothing had happened."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from capsfl.ledger.chain import Ledger

pytestmark = pytest.mark.journey

MOMENTS = {
    "in round 2, between the ledger's log and its head": ("os.rename", r"ledger/head$", 3),
    "in round 2, between ledger and checkpoint": ("os.mkdir", r"segmentation/2\.orbax-checkpoint-tmp$", 1),
    "in classification, a checkpoint written but not yet named": ("os.rename", r"classification/1$", 1),
}
MORE_MOMENTS = {
    "before anything is trained": ("os.mkdir", r"federated/keys$", 1),
    "in round 1, before its first checkpoint": ("os.mkdir", r"segmentation/1\.orbax-checkpoint-tmp$", 1),
    "in round 2, its arrays half written": ("os.rename", r"segmentation/2\.orbax-checkpoint-tmp/ledger$", 1),
    "between the stages": ("os.mkdir", r"checkpoints/classification$", 1),
    "at the end, before the results": ("os.rename", r"federated/results\.json$", 1),
    "at the very end, before the page": ("os.rename", r"report\.html$", 1),
}
if "CAPSFL_TORTURE" in os.environ:
    MOMENTS |= MORE_MOMENTS


def digests(run: Path) -> dict[tuple[str, int], dict[str, str]]:
    """Every tensor's digest after every round, as the ledger has them."""
    with Ledger.open(run / "federated" / "ledger") as ledger:
        return {(record.task, record.round): dict(record.leaves) for record in ledger.rounds()}


def curve(run: Path) -> list[tuple[str, int, float]]:
    """Task, round and loss of every line of the run's curves."""
    lines = (run / "federated" / "metrics.jsonl").read_text().splitlines()
    return [(row["task"], row["round"], row["loss"]) for row in map(json.loads, lines)]


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_a_killed_run_ends_bit_identical_to_one_that_was_not(
    study, configuration, capsfl, environment: Mapping[str, str], tmp_path: Path, moment: tuple[str, str, int]
):
    event, pattern, count = moment
    config = configuration(tmp_path / "killed")
    killed = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed.py"), event, pattern, str(count), "--", "train", config],
        capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert killed.returncode == -9, f"the moment never came: {killed.stdout}\n{killed.stderr}"

    capsfl("train", config)

    assert digests(tmp_path / "killed") == digests(study.run)
    assert curve(tmp_path / "killed") == curve(study.run), "a round twice, or lost, or another loss"
    assert not list((tmp_path / "killed").rglob("*tmp*")), "leftovers of the killed run"
    assert capsfl("verify", tmp_path / "killed").code == 0


def test_a_finished_study_run_again_is_left_as_it_is_and_answers_soon(
    study_copy: Path, configuration: Callable[[Path], Path], capsfl
):
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    config = configuration(study_copy)
    before, start = contents(study_copy), os.times()
    capsfl("train", config)
    after, end = contents(study_copy), os.times()
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"study.json", "report.html"}, "only the study's clock moves, and the page that shows it"
    assert end.children_user - start.children_user < 10, "seconds of processor time to find that all is done"
