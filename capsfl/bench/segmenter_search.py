"""Chooses a network's step size by short trials: the same for every network, scored on training patches held back."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from capsfl.bench.segmenter_data import Fold
from capsfl.bench.segmenter_training import SegmenterTrainer


class Trial(NamedTuple):
    """One step size, tried.

    Attributes:
        learning_rate: peak of Adam's step size.
        dice: of the patches held back.
        loss: mean over the last tenth of the trial's steps.
        cpu_s: of the trial's steps.
    """

    learning_rate: float
    dice: float
    loss: float
    cpu_s: float


def search_rate(
    trainer: SegmenterTrainer,
    fold: Fold,
    rates: Sequence[float],
    *,
    seed: int,
    steps: int,
    say: Callable[[str], None],
) -> tuple[float, list[Trial]]:
    """Trains with every step size on the fold without its patches held back; no test case is looked at.

    Returns:
        The step size of the highest Dice on the patches held back, and all trials. Of equals, as where nothing is
        marked yet, the one with the lower loss in training.
    """
    trial, held = fold.trial, fold.held_back
    found = []
    for rate in sorted(rates):
        trained = trainer.train(trial, seed=seed, learning_rate=rate, steps=steps)
        dice = trainer.held_back_dice(trained.parameters, held)
        loss = float(np.mean(trained.losses[-max(steps // 10, 1) :]))
        found.append(Trial(rate, dice, loss, trained.cpu_s))
        say(f"  step size {rate:g}, {fold.name}, {steps} steps: loss {loss:.3f}, Dice held back {dice:.3f}")
    # A loss that is no number never wins.
    return max(found, key=lambda one: (one.dice, np.nan_to_num(-one.loss, nan=-np.inf))).learning_rate, found
