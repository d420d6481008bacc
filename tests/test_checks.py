"""What is refused before the first arm trains, although a later one would be the one to fail."""

from pathlib import Path

import numpy as np
import pytest

from capsfl.config import ArmConfig, ClassificationStage, StudyConfig
from capsfl.ct.phantom import PhantomConfig
from capsfl.federated.local import LocalConfig
from capsfl.learning.patients import Patient
from capsfl.models.zoo import parse_network
from capsfl.study import Split
from capsfl.training.checks import check_before_training
from capsfl.training.run import plan_runs

NOTHING = np.zeros((2, 2, 2), np.float32)


@pytest.fixture
def split() -> Split:
    def part(name: str) -> tuple[Patient, ...]:
        rows = ((hospital, number) for hospital in "ABC" for number in range(2))
        return tuple(Patient(f"{h}-{name}-{n}", h, "", n, NOTHING, NOTHING > 0, None, (1.0, 1.0, 1.0)) for h, n in rows)

    return Split(part("train"), part("validation"), part("test"))


def check(split: Split, folder: Path, **arm) -> None:
    model = arm.pop("model")
    config = StudyConfig(
        phantom=PhantomConfig(),
        classification=ClassificationStage(rounds=1, image_size=64, local=LocalConfig(batch_size=2)),
        arms=(ArmConfig(), ArmConfig(name="late", model=parse_network({"image_size": 64, **model}), **arm)),
    )
    check_before_training(config, split, plan_runs(config, folder, split))


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"model": {"name": "mobilenet", "weights": "nowhere.h5"}}, "weights = nowhere.h5: no such file"),
        ({"model": {"name": "mobilenet"}, "noise_multiplier": 1.0}, "batch_norm"),
        (
            {"model": {"name": "mobilenet"}, "noise_multiplier": 1.0, "unit": "patient", "expected_patients": 1},
            "the model of classification has batch normalisation",
        ),
    ],
)
def test_an_arm_that_would_fail_in_its_turn_is_refused_at_once(split, tmp_path, arm, message):
    with pytest.raises(ValueError, match=message):
        check(split, tmp_path, **arm)


def test_a_network_without_statistics_may_be_private(split, tmp_path):
    check(split, tmp_path, model={"name": "alexnet", "norm": "group"}, noise_multiplier=1.0)
    check(split, tmp_path, model={"name": "alexnet"})
