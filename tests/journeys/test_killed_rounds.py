"""Rounds killed at any moment: in training, in a checkpoint, between ledger and checkpoint and the other way round."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = [pytest.mark.journey, pytest.mark.torture]

TORTURE = "CAPSFL_TORTURE" in os.environ
BY_CHANCE, EVERY, FIXED = {"quantile clipping, server Adam": 2}, 3, 3
if TORTURE:
    EVERY, FIXED = 1, 9
    BY_CHANCE = {
        "Gaussian noise": 60,
        "quantile clipping, server Adam": 30,
        "control variates, server Adam": 30,
        "pmap over two devices": 30,
        "hospitals on disk": 30,
        "hospitals that vote": 30,
    }


@pytest.mark.parametrize("variant", BY_CHANCE)
def test_rounds_killed_at_any_moment_end_bit_identical_to_those_that_were_not(
    variant: str, environment: Mapping[str, str], tmp_path: Path
):
    command = [sys.executable, str(Path(__file__).with_name("killed_rounds.py")), str(tmp_path / "runs")]
    done = subprocess.run(
        [*command, str(BY_CHANCE[variant]), str(EVERY), variant],
        capture_output=True,
        text=True,
        timeout=3600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    print(variant, answer)
    assert answer["kills"] == FIXED + BY_CHANCE[variant]
    assert not TORTURE or all(answer["stages"].values()), "a stage without a kill"
