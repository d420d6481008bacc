"""A run that is killed and started again ends as if nothing had happened."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from contents import assert_same, assert_within, contents

pytestmark = pytest.mark.journey

MOMENTS = (("in classification, a checkpoint written but not yet named", "os.rename", r"classification/1$", 1),)
MORE_MOMENTS = (
    ("before anything is trained", "os.mkdir", r"federated/keys$", 1),
    ("its keys made, its ledger not founded", "os.rename", r"ledger/head$", 1),
    ("in round 1, before its first checkpoint", "os.mkdir", r"segmentation/1\.orbax-checkpoint-tmp$", 1),
    ("in round 2, between the ledger's log and its head", "os.rename", r"ledger/head$", 2),
    ("in round 2, between ledger and checkpoint", "os.mkdir", r"segmentation/2\.orbax-checkpoint-tmp$", 1),
    ("in round 2, its arrays half written", "os.rename", r"segmentation/2\.orbax-checkpoint-tmp/ledger$", 1),
    ("in round 2, its checkpoint written but not yet named", "os.rename", r"segmentation/2$", 1),
    ("between the stages", "os.mkdir", r"checkpoints/classification$", 1),
    ("at the end, before the results", "os.rename", r"federated/results\.json$", 1),
    ("at the very end, before the page", "os.rename", r"report\.html$", 1),
)
TORTURE = "CAPSFL_TORTURE" in os.environ
if TORTURE:
    # In the order in which they come in one run, so that one study lives through them all.
    MOMENTS = (*MORE_MOMENTS[:8], *MOMENTS, *MORE_MOMENTS[8:])


@pytest.fixture(scope="session")
def killed(environment: Mapping[str, str]) -> Callable[..., int]:
    """Runs a command that is to be killed at a moment; returns its exit status."""

    def run(moment: tuple[str, str, int], *words: str | Path) -> int:
        event, pattern, count = moment
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("killed.py"), event, pattern, str(count), "0", "--", *words],
            capture_output=True, text=True, timeout=600, env=environment,
        )  # fmt: skip
        assert done.returncode in (0, -9), f"{moment}: {done.stdout}\n{done.stderr}"
        return done.returncode

    return run


@pytest.mark.torture
def test_a_study_killed_again_and_again_ends_bit_identical_to_one_that_was_not(
    study, configuration, killed, capsfl, here, tmp_path: Path
):
    out, unbroken = tmp_path / "killed", contents(study.run)
    config = configuration(out)
    for what, *moment in MOMENTS:
        assert killed(moment, "train", config) == -9, f"{what}: the moment never came"
        assert_within(out, unbroken)

    assert capsfl("train", config).err == ""

    assert_same(out, study.run)
    assert here("verify", out).code == 0


def test_a_finished_study_run_again_is_left_as_it_is_and_answers_soon(
    study_copy: Path, configuration: Callable[[Path], Path], capsfl
):
    def files(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    config = configuration(study_copy)
    before, start = files(study_copy), os.times()
    capsfl("train", config)
    after, end = files(study_copy), os.times()
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"study.json", "report.html"}, "only the study's clock moves, and the page that shows it"
    assert end.children_user - start.children_user < 10, "seconds of processor time to find that all is done"


@pytest.mark.torture
@pytest.mark.skipif(not TORTURE, reason="a minute of processor time: make torture")
@pytest.mark.parametrize("damage", ["cut", "emptied", "one bit"])
def test_a_damaged_newest_checkpoint_is_refused_by_name_and_without_it_the_study_ends_bit_identical(
    study, study_copy: Path, configuration, capsfl, damage: str
):
    (study_copy / "federated/results.json").unlink()
    newest = study_copy / "federated/checkpoints/classification/2"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[: len(content) // 2], "emptied": b"", "one bit": content}[damage])
    line = capsfl("train", configuration(study_copy), expect=2).err
    assert len(line.splitlines()) == 1, line
    assert str(newest) in line
    assert "delete this folder to" in line
    shutil.rmtree(newest)
    capsfl("train", configuration(study_copy))
    assert_same(study_copy, study.run)


@pytest.mark.torture
@pytest.mark.skipif(not TORTURE, reason="a minute of processor time: make torture")
def test_of_two_commands_started_at_once_one_trains_and_the_other_is_refused(
    study, configuration, environment: Mapping[str, str], tmp_path: Path
):
    out = tmp_path / "twice"
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), "record", os.devnull, "--", "train"]
    both = [
        subprocess.Popen([*command, str(configuration(out))], stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    lines = [process.communicate(timeout=600)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], lines
    (line,) = filter(None, lines)
    assert str(out) in line
    assert "another `capsfl train` is at work" in line
    assert_same(out, study.run)
