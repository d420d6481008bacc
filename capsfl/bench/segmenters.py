"""SegCaps, U-Net and U-Net++ side by side: lungs, leaving one volume out, and tumours in patches.

Every network sees the same patches in the same order, changed alike, for as many steps of Adam; the step size
is chosen from the same few by trials of equal length on training patches held back; the weights after the last
step are scored, and nothing is chosen by the test cases. LaLonde & Bagci 2018 (SegCaps),
Ronneberger et al. 2015 (U-Net), Zhou et al. 2018 (U-Net++).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from capsfl.bench.machine import describe
from capsfl.bench.segmenter_controls import mark_lungs, mark_middle
from capsfl.bench.segmenter_data import Fold, TaskName, leave_one_out, read_lungs, read_tumours
from capsfl.bench.segmenter_picture import Shown, choose_cases, fullest_slices
from capsfl.bench.segmenter_scores import Scores, compare, judge_goal, score_masks, summarize
from capsfl.bench.segmenter_search import search_rate
from capsfl.bench.segmenter_training import SegmenterTrainer, SegmenterTrainingConfig
from capsfl.learning.augmentation import AugmentationConfig
from capsfl.learning.patients import Patient
from capsfl.learning.segmentation import SegmentationConfig
from capsfl.learning.segmenters import SegmenterConfig
from capsfl.models.segcaps import SegCapsConfig
from capsfl.models.unet import UNetConfig, UNetPlusPlusConfig

NetworkName: TypeAlias = Literal["segcaps", "segcaps-published", "unet", "unet++"]
NETWORKS: tuple[NetworkName, ...] = ("segcaps", "unet", "unet++")
CROP = 64
"""Side of the lungs' training patches in voxels; smaller where the volumes are."""
STEPS: dict[TaskName, int] = {"lungs": 150, "tumours": 300}
QUICK_STEPS: dict[TaskName, int] = {"lungs": 40, "tumours": 60}
LEARNING_RATES: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
"""Peaks of Adam's step size that every network is tried with."""
UNTRIED = 3e-3
"""The peak where nothing is tried: the middle one."""
TRIAL_SHARE = 5
"""A trial has one step for so many of the training."""
LUNG_PATCHES = 32
"""Patches cut from each plane of each volume."""
SHOWN_PATCHES = 6


@dataclass(frozen=True)
class SegmentersBench:
    """SegCaps, U-Net and U-Net++ with the same budget: Dice, HD95, volume, parameters, memory, time; a picture."""

    data: Path
    """Folder of NAME.nii.gz with NAME-msk.nii.gz (lungs), or of val_patches.h5 and test_patches.h5 (tumours)."""
    task: TaskName = "lungs"
    """What is segmented: lungs on three planes, one volume left out in turn; or tumours in patches of other
    patients."""
    networks: tuple[NetworkName, ...] = NETWORKS
    """Networks to train: `segcaps` with `norm = "length"`, `segcaps-published` without."""
    width: float = 0.25
    """Factor on the published widths of all of them; 1 is 1.43, 31.0 and 9.0 million parameters and wants an
    accelerator, 0.25 a sixteenth of that."""
    steps: int | None = None
    """Steps of each training; by default 150 for lungs and 300 for tumours."""
    batch_size: int = 8
    """Patches in a step."""
    learning_rate: float | None = None
    """Peak of Adam's step size for all; by default every network and fold has its own, chosen by trials."""
    learning_rates: tuple[float, ...] = LEARNING_RATES
    """Peaks to try, the same for every network, on training patches held back."""
    trial_steps: int | None = None
    """Steps of a trial; by default a fifth of those of a training."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, patches, order and augmentation."""
    quick: bool = False
    """One seed, one fold, few steps, no trials: it shows that all of them learn, and no more."""


def network_config(name: NetworkName, width: float) -> SegmenterConfig:
    """The published network with every width multiplied; SegCaps with its normalisation by length beside it."""
    if name == "segcaps":
        return SegCapsConfig(width=width, norm="length")
    if name == "segcaps-published":
        return SegCapsConfig(width=width)
    if name == "unet":
        return UNetConfig(width=max(1, round(64 * width)))
    return UNetPlusPlusConfig(width=max(1, round(32 * width)))


def measure(options: SegmentersBench, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains every network on every fold with every seed, and scores it on cases that it never saw.

    Returns:
        The result, JSON-ready but for `shown`, the slices of the picture.

    Raises:
        ValueError: data that cannot be used, or an option out of range.
    """
    _check(options)
    seeds = options.seeds[:1] if options.quick else options.seeds
    training = SegmenterTrainingConfig(
        steps=options.steps or (QUICK_STEPS if options.quick else STEPS)[options.task],
        batch_size=options.batch_size,
    )
    fixed = options.learning_rate or (UNTRIED if options.quick else None)
    trial_steps = 0 if fixed else options.trial_steps or max(training.steps // TRIAL_SHARE, 1)
    folds, base = _prepare(options, seeds)
    first = folds[seeds[0]]
    cases = [case for fold in first for case in fold.test]
    say(f"segmenters, {options.task}: {len(cases)} cases, {len(first[0].pool['truth'])} training patches")

    runs: dict[str, list[Scores]] = {}
    rows: list[dict[str, Any]] = []
    networks: dict[str, dict[str, Any]] = {}
    marked: dict[str, list[np.ndarray]] = {}
    for name in options.networks:
        config = base.model_copy(update={"model": network_config(name, options.width)})
        trainer = SegmenterTrainer(config, training, first[0].pool)
        say(f"segmenters, {name}: {trainer.facts['parameters']:,} parameters, compiled")
        choice = {fold.name: _choose_rate(options, trainer, fold, seeds[0], trial_steps, say=say) for fold in first}
        networks[name] = {"config": config.model.model_dump(mode="json"), "choice": choice, **trainer.facts}
        rates = {fold: chosen["learning_rate"] for fold, chosen in choice.items()}
        for seed in seeds:
            row, masks = _train_one(name, trainer, folds[seed], rates, seed, say=say)
            rows.append(row)
            runs.setdefault(name, []).append(row["scores"])
            marked.setdefault(name, masks)
    control = mark_lungs if options.task == "lungs" else mark_middle
    controlled = score_masks([mask for fold in first for mask in control(fold)], cases)
    ours = "segcaps" if "segcaps" in runs else "segcaps-published"
    against = compare(runs, {name: found["parameters"] for name, found in networks.items()}, ours=ours)
    return {
        "benchmark": f"segmenters-{options.task}",
        "quick": options.quick,
        "machine": describe(),
        "task": options.task,
        "width": options.width,
        "training": training.model_dump(mode="json"),
        "trial_steps": trial_steps,
        "augmentation": base.augmentation.model_dump(mode="json"),
        "patches": len(first[0].pool["truth"]),
        "crop": int(first[0].pool["truth"].shape[1]),
        "seeds": list(seeds),
        "cases": [case.name for case in cases],
        "truth_ml": [_truth_ml(case) for case in cases],
        "networks": networks,
        "rows": rows,
        "summary": {name: summarize(found) for name, found in runs.items()},
        "control": {"name": control.__name__.replace("_", " "), "scores": controlled, **summarize([controlled])},
        "ours": ours,
        "against": against,
        "goal": judge_goal(against),
        "shown": _choose_slices(options.task, cases, marked),
    }


def _prepare(
    options: SegmentersBench, seeds: tuple[int, ...]
) -> tuple[dict[int, tuple[Fold, ...]], SegmentationConfig]:
    """The folds of every seed, and what all networks have in common."""
    if options.task == "tumours":
        augmentation = AugmentationConfig(flips=("left-right", "front-back"), rotation_degrees=45.0, scale=0.2)
        base = SegmentationConfig(target="tumour", planes=("xy",), positive_weight=2.0, augmentation=augmentation)
        fold = read_tumours(options.data)
        return dict.fromkeys(seeds, (fold,)), base
    patients = read_lungs(options.data)
    augmentation = AugmentationConfig(flips=("left-right",), rotation_degrees=10.0, scale=0.1, noise_hu=30.0)
    base = SegmentationConfig(
        target="lungs",
        positive_weight=1.0,
        augmentation=augmentation,
        crop=min(CROP, *patients[0].hu.shape),
        crops_per_plane=LUNG_PATCHES,
    )
    folds = {seed: leave_one_out(patients, base, seed=1000 * seed) for seed in seeds}
    # A quick run leaves out the last volume alone.
    return ({seed: found[-1:] for seed, found in folds.items()} if options.quick else folds), base


def _choose_rate(
    options: SegmentersBench,
    trainer: SegmenterTrainer,
    fold: Fold,
    seed: int,
    steps: int,
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The step size of one network on one fold, and the trials that chose it; JSON-ready."""
    if not steps:
        return {"learning_rate": options.learning_rate or UNTRIED, "trials": []}
    rate, trials = search_rate(trainer, fold, options.learning_rates, seed=seed, steps=steps, say=say)
    return {"learning_rate": rate, "trials": [trial._asdict() for trial in trials]}


def _train_one(
    name: str,
    trainer: SegmenterTrainer,
    folds: tuple[Fold, ...],
    rates: dict[str, float],
    seed: int,
    *,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """One seed of one network on all folds: its row, and the masks of all cases."""
    masks: list[np.ndarray] = []
    axial_dice: list[float] = []
    scores: Scores = {}
    losses, cpu, marking_cpu = [], 0.0, 0.0
    for fold in folds:
        trained = trainer.train(fold, seed=seed, learning_rate=rates[fold.name])
        fused, axial, taken = trainer.mark(trained.parameters, fold)
        for key, values in score_masks(fused, fold.test).items():
            scores.setdefault(key, []).extend(values)
        axial_dice += score_masks(axial, fold.test)["dice"]
        masks += fused
        losses.append([float(np.mean(part)) for part in np.array_split(trained.losses, min(10, len(trained.losses)))])
        cpu, marking_cpu = cpu + trained.cpu_s, marking_cpu + taken
        say(
            f"segmenters, {name}, seed {seed}, {fold.name}: loss {losses[-1][0]:.3f} to {losses[-1][-1]:.3f}, "
            f"Dice {np.mean(scores['dice'][-len(fold.test) :]):.3f} after {trained.cpu_s:.0f} CPU s"
        )
    row = {
        "network": name,
        "seed": seed,
        "scores": scores,
        "axial_dice": axial_dice,
        "loss": losses,
        "train_cpu_s": cpu / len(folds),
        "mark_cpu_s": marking_cpu / len(masks),
    }
    return row, masks


def _choose_slices(task: TaskName, cases: list[Patient], marked: dict[str, list[np.ndarray]]) -> list[Shown]:
    """Slices of the first seed: of every volume, or of patches chosen by the size of their truth."""
    places = range(len(cases)) if task == "lungs" else choose_cases(cases, SHOWN_PATCHES)
    return [
        one
        for place in places
        for one in fullest_slices(cases[place], {name: masks[place] for name, masks in marked.items()})
    ]


def _truth_ml(case: Patient) -> float:
    assert case.truth is not None
    return float(case.truth.sum() * np.prod(case.spacing_mm) / 1000)


def _check(options: SegmentersBench) -> None:
    if not 1 / 64 <= options.width <= 4:
        raise ValueError(f"width = {options.width}: expected 1/64 to 4, a factor on the published networks")
    for name in ("networks", "seeds", "learning_rates"):
        values = getattr(options, name)
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} = {list(values)}: give at least one, and none twice")
    if not all(rate > 0 for rate in options.learning_rates):
        raise ValueError(f"learning_rates = {list(options.learning_rates)}: must all be above 0")
    for name in ("steps", "batch_size", "learning_rate", "trial_steps"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} = {value}: must be above 0")
