"""What a sweep trains: synthetic images, MNIST over hospitals, phantom hospitals, or a stage of an ingested study."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from capsfl.ct.phantom import PhantomConfig
from capsfl.federated.hospitals import Hospitals, stack_hospitals
from capsfl.learning.classification import ClassificationConfig
from capsfl.learning.segmentation import SegmentationConfig
from capsfl.learning.tasks import Task
from capsfl.settings import Settings
from capsfl.sweeps.classifier import ImageModelConfig, make_image_task
from capsfl.sweeps.mnist import read_mnist, split_over_hospitals


class SyntheticProblem(Settings):
    """Small grey images of smooth class templates in noise, drawn from a seed: runs anywhere in seconds."""

    kind: Literal["synthetic"] = "synthetic"
    """Nothing to download."""
    hospitals: int = Field(default=50, ge=1)
    """H."""
    records: int = Field(default=32, ge=1)
    """Images of a hospital."""
    side: int = Field(default=8, ge=4)
    """Pixels along a side."""
    classes: int = Field(default=4, ge=2)
    """Classes."""
    noise: float = Field(default=1.0, gt=0)
    """Standard deviation of the noise on a pixel; templates have standard deviation 1."""
    skew: float = Field(default=1.0, gt=0)
    """Concentration of the Dirichlet draw of a hospital's class shares; small values make hospitals differ."""
    scored: int = Field(default=1024, ge=1)
    """Held-out images, of all classes alike."""
    seed: int = Field(default=0, ge=0)
    """Seed of the images; the same for every study."""
    model: ImageModelConfig = ImageModelConfig()
    """The network."""


class MnistProblem(Settings):
    """MNIST over hospitals, by default non-IID as in McMahan et al. 2017: sorted by digit, cut into shards."""

    kind: Literal["mnist"] = "mnist"
    """Read from files; nothing is downloaded."""
    folder: str
    """Folder with the four IDX files of MNIST (`train-images-idx3-ubyte` and so on, .gz or not)."""
    hospitals: int = Field(default=100, ge=1)
    """H."""
    split: Literal["shards", "iid"] = "shards"
    """`shards` gives every hospital images of few digits; `iid` deals them out evenly."""
    shards_per_hospital: int = Field(default=2, ge=1)
    """Shards of a hospital: about that many digits."""
    records: int | None = Field(default=None, ge=1)
    """Images of a hospital at most; all when absent."""
    pool: Literal[1, 2, 4] = 1
    """Averages blocks of so many pixels a side: 28, 14 or 7 pixels."""
    scored_on: Literal["validation", "test"] = "validation"
    """The last 10,000 training images, which no hospital then holds, or the 10,000 test images."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split; the same for every study."""
    model: ImageModelConfig = ImageModelConfig(hidden=(64,))
    """The network."""


class StudyProblem(Settings):
    """A stage of a study that `capsfl train` has ingested, scored on its validation patients."""

    kind: Literal["study"] = "study"
    """Reads the volumes and the split of patients from a study folder."""
    folder: str
    """Folder that `capsfl train` wrote."""
    stage: Literal["segmentation", "classification"] = "segmentation"
    """Patches under masks, or slices masked by the trained segmentation of the study's first arm."""
    segmentation: SegmentationConfig = SegmentationConfig()
    """Network and patches of stage `segmentation`."""
    classification: ClassificationConfig = ClassificationConfig()
    """Network and slices of stage `classification`."""


class PhantomProblem(Settings):
    """Chest-CT phantoms, their whole slices classified; `problem.hospitals` says how many hospitals take part."""

    kind: Literal["phantom"] = "phantom"
    """Nothing to download."""
    folder: str = "runs/phantom_hospitals"
    """Where the phantom is drawn to, once; another sweep of the same phantom finds it there."""
    phantom: PhantomConfig = PhantomConfig(hospitals=16, patients=112, positives_fraction=0.5, matrix=256)
    """All hospitals and their patients."""
    hospitals: int | None = Field(default=None, ge=1)
    """H: the first so many hospitals train, each on its own patients, or all; test patients of all are scored."""
    field: tuple[int, int, int] | None = (64, 80, 112)
    """Central voxels (z, y, x) that the slices are cut from, multiples of 8; whole volumes when absent."""
    test_fraction: float = Field(default=0.4, gt=0, lt=1)
    """Share of every hospital's patients that is never trained on."""
    classification: ClassificationConfig = ClassificationConfig(slices="dense", slices_per_scan=6)
    """Network and slices."""


Problem = SyntheticProblem | MnistProblem | PhantomProblem | StudyProblem


@dataclass(frozen=True)
class Built:
    """A problem ready to be trained.

    Attributes:
        hospitals: training records.
        held_out: records to score on; never trained on.
        make_task: `seed -> Task`; only the initial weights depend on the seed.
        utility: name of the score that studies are compared by; higher is better.
        scored: what one held-out record is: a patient, decided from all of its images, a patch or an image.
    """

    hospitals: Hospitals
    held_out: Hospitals
    make_task: Callable[[int], Task]
    utility: str
    scored: Literal["patients", "patches", "images"] = "images"


def build(problem: Problem) -> Built:
    """Reads or draws the records of a problem; equal records are kept for the next call.

    Raises:
        ValueError: files that are absent or damaged, or hospitals without records; the message names field or file.
    """
    if isinstance(problem, StudyProblem):
        from capsfl.sweeps.stage import build_stage

        stage: Any = problem.segmentation if problem.stage == "segmentation" else problem.classification
        hospitals, held_out, make_stage_task = build_stage(problem.folder, problem.stage, stage)
        figures: Any = ("dice", "patches") if problem.stage == "segmentation" else ("accuracy", "patients")
        return Built(hospitals, held_out, make_stage_task, *figures)
    if isinstance(problem, PhantomProblem):
        from capsfl.sweeps.phantoms import build_phantom

        options = {name: getattr(problem, name) for name in ("hospitals", "field", "test_fraction")}
        parts = build_phantom(problem.folder, problem.phantom, config=problem.classification, **options)
        return Built(*parts, "accuracy", "patients")
    frozen: Any = problem.model_copy(update={"model": ImageModelConfig()})
    hospitals, held_out, classes = _images(frozen)
    side = held_out.records["image"].shape[2]

    def make_task(seed: int) -> Task:
        return make_image_task(problem.model, side=side, classes=classes, seed=seed)

    return Built(hospitals, held_out, make_task, "accuracy")


@lru_cache(maxsize=4)
def _images(problem: SyntheticProblem | MnistProblem) -> tuple[Hospitals, Hospitals, int]:
    if isinstance(problem, SyntheticProblem):
        return (*_draw(problem), problem.classes)
    train, scored = read_mnist(Path(problem.folder), scored_on=problem.scored_on, pool=problem.pool)
    shares = split_over_hospitals(
        train["label"],
        hospitals=problem.hospitals,
        shards=problem.shards_per_hospital if problem.split == "shards" else None,
        most=problem.records,
        seed=problem.seed,
    )
    records = {f"H{number}": {name: leaf[rows] for name, leaf in train.items()} for number, rows in enumerate(shares)}
    return stack_hospitals(records), stack_hospitals({problem.scored_on: scored}), 10


def _draw(problem: SyntheticProblem) -> tuple[Hospitals, Hospitals]:
    generator = np.random.default_rng(problem.seed)
    side = problem.side
    # A random walk along both axes is smooth; every template is brought to mean 0 and deviation 1.
    templates = generator.normal(size=(problem.classes, side, side)).cumsum(axis=1).cumsum(axis=2)
    templates -= templates.mean(axis=(1, 2), keepdims=True)
    templates /= templates.std(axis=(1, 2), keepdims=True)

    def images(labels: np.ndarray) -> dict[str, Any]:
        noisy = templates[labels] + problem.noise * generator.normal(size=(len(labels), side, side))
        return {"image": noisy.astype(np.float32)[..., None], "label": labels.astype(np.int32)}

    records = {}
    for number in range(problem.hospitals):
        shares = generator.dirichlet(np.full(problem.classes, problem.skew))
        records[f"H{number}"] = images(generator.choice(problem.classes, size=problem.records, p=shares))
    scored = images(np.arange(problem.scored) % problem.classes)
    return stack_hospitals(records), stack_hospitals({"held out": scored})
