"""The configuration of a study: one TOML file, validated strictly, overridden from the command line."""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from capsfl.consensus import ConsensusConfig, rules_of
from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.normalize import VolumeConfig
from capsfl.ct.phantom import PhantomConfig
from capsfl.ct.reader import ReaderConfig
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import RoundsConfig, draws_noise
from capsfl.learning.classification import ClassificationConfig
from capsfl.learning.networks import NetworkConfig, named_network
from capsfl.learning.segmentation import SegmentationConfig
from capsfl.privacy.config import LEAST_CLIP_NORM
from capsfl.privacy.plan import PrivacyConfig
from capsfl.settings import Settings, explain


class ConfigError(ValueError):
    """A configuration that cannot be used; each line names the file, the dotted field, the value and the remedy."""


class SegmentationStage(SegmentationConfig, RoundsConfig):
    """Segmentation: what is marked, by which network, trained how."""


class ClassificationStage(ClassificationConfig, RoundsConfig):
    """Classification: which slices or pictures, which network, trained how."""


class DataConfig(Settings):
    """Where scans come from and how patients are split."""

    source: str = ""
    """A manifest (CSV), a folder holding manifest.csv, a DICOM series, a NIfTI file, or the top folder of
    `data.collection`; empty for the phantom."""
    root: str = ""
    """Folder that the manifest's paths start from; empty for the manifest's own folder."""
    collection: CollectionConfig | None = None
    """Which public collection `source` is, and how its patients become hospitals; absent for a manifest or a scan."""
    reader: ReaderConfig = ReaderConfig()
    """What the readers may mend, and the size at which they refuse."""
    volumes: VolumeConfig = VolumeConfig()
    """The standard volume."""
    field: tuple[int, int, int] | None = None
    """Central voxels (z, y, x) that the models see, multiples of 8; the whole volume when absent."""
    test_fraction: float = Field(default=0.3, ge=0, lt=1)
    """Share of every hospital's patients that is never trained on, where the manifest gives no split."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of every hospital's patients for the curves and the threshold, where the manifest gives no split."""
    split_seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Seed of the split of patients; the study's seed when absent. Studies of several seeds then test the same ones."""
    on_error: Literal["raise", "skip"] = "raise"
    """Whether a scan that cannot be read stops the run or is left out by name."""
    residence: Literal["memory", "disk"] = "memory"
    """Where federated hospitals keep their training records: in memory, or in the run folder, read cohort by cohort
    while the round before trains; for more hospitals than memory holds. The result is the same bit for bit."""


class ArmConfig(Settings):
    """One of the trainings that a study compares."""

    name: str = Field(default="federated", pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    """Folder of the arm inside the study: lower-case letters, digits, `-`, `_`."""
    partition: Literal["hospitals", "pooled", "local", "leave-one-out"] = "hospitals"
    """Federated over the hospitals, one hospital holding all records, every hospital alone, or for each hospital a
    federation of the others, judged on the patients of the one left out."""
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Replaces the study's seed in this training, on the same split of patients: arms that differ in it alone show how
    far a result moves with weights, batches and noise."""
    clip_norm: float | None = Field(default=None, ge=LEAST_CLIP_NORM)
    """Replaces privacy.clip_norm."""
    noise_multiplier: float | None = Field(default=None, ge=0)
    """Replaces privacy.noise_multiplier."""
    unit: Literal["hospital", "patient"] | None = None
    """Replaces privacy.unit."""
    expected_patients: int | None = Field(default=None, ge=1)
    """Replaces privacy.expected_patients."""
    model: NetworkConfig | None = None
    """Replaces classification.model, so that networks can be compared on the same split with the same budget."""
    labels: Literal["true", "permuted"] = "true"
    """Permuted trains on labels dealt anew among the people of each hospital, and judges by the true ones: a control
    that has to come out at chance, or something but the disease tells the classes apart."""

    @property
    def federates(self) -> bool:
        """Whether several hospitals train together, each with its own records."""
        return self.partition in ("hospitals", "leave-one-out")

    @property
    def has_members(self) -> bool:
        """Whether the arm is a run for every hospital: the hospital alone, or all but it."""
        return self.partition in ("local", "leave-one-out")


class ReportConfig(Settings):
    """What the page shows beside the results."""

    interpretation: bool = True
    """Whether to show what the capsules of a few test patients do: the decoder's image as one dimension of a class
    capsule moves, and the couplings of SegCaps. It costs a run about seven seconds after training, nearly
    all of them to compile, and nothing where the networks have no decoder and route once."""


class StudyConfig(Settings):
    """A study: data, stages, privacy, and the arms that are trained side by side."""

    out: str = "runs/study"
    """Run folder; training resumes from it when it is not empty."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of splits, weights, sampling and noise; see data.split_seed and arms.seed."""
    phantom: PhantomConfig | None = None
    """Chest-CT phantom to generate when data.source is empty."""
    data: DataConfig = DataConfig()
    """Scans."""
    segmentation: SegmentationStage | None = None
    """First stage; where it is absent, the classifier sees whole slices or pictures."""
    classification: ClassificationStage | None = None
    """Second stage, or the only one; absent to skip it."""
    privacy: PrivacyConfig = PrivacyConfig(clip_norm=10.0)
    """Sampling, clipping and noise, of hospitals or of patients (`privacy.unit`)."""
    consensus: ConsensusConfig | None = None
    """What hospitals sign beside the owner of the ledger; absent where the owner decides alone."""
    devices: DevicesConfig = DevicesConfig()
    """Layout over accelerators."""
    places: int | None = Field(default=None, ge=1)
    """Hospitals a run has room for and its privacy is accounted for; they may then join and leave between two starts.
    When absent, the hospitals of the first start are those of the whole run."""
    arms: tuple[ArmConfig, ...] = (ArmConfig(),)
    """Trainings that are compared; the first one is the study's own."""
    jobs: int | None = Field(default=None, ge=1)
    """Arms trained side by side; when absent one per core on a CPU, one at a time on accelerators."""
    keep_checkpoints: int | None = Field(default=None, ge=1)
    """Newest rounds kept per stage; all when absent, so that `capsfl verify` can recompute every round."""
    report: ReportConfig = ReportConfig()
    """The page."""

    @model_validator(mode="after")
    def _consistent(self) -> "StudyConfig":
        if self.segmentation is None and self.classification is None:
            raise ValueError("segmentation: neither [segmentation] nor [classification] is given; add a stage")
        for number, arm in enumerate(self.arms):
            if arm.model is None:
                continue
            if self.classification is None:
                raise ValueError(f"arms.{number}.model: there is no [classification] whose network it could replace")
            try:
                _ = self.arm(arm)
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"arms.{number}.model: {message}") from None
        if not self.data.source and self.phantom is None:
            raise ValueError("data.source: empty, and there is no [phantom]; name a manifest or add [phantom]")
        for name, stage in self.stages.items():
            if self.data.residence == "disk" and stage.scaffold:
                raise ValueError(
                    f'data.residence = "disk": {name}.scaffold keeps a copy of the model for every hospital in memory; '
                    "switch scaffold off, or keep the records in memory"
                )
        learned = self.segmentation is not None and self.segmentation.fusion == "learned"
        if learned and any(draws_noise(self.arm(arm).privacy) for arm in self.arms):
            raise ValueError(
                'segmentation.fusion = "learned": its weights are fitted to validation patients without noise, which '
                "no guarantee would cover; choose mean, max or min, or train without noise"
            )
        if self.consensus is not None:
            rules_of(self.consensus, self.stages)
        if self.places is not None and any(arm.partition == "leave-one-out" for arm in self.arms):
            raise ValueError(
                f"places = {self.places}: who is left out of which run must not change between two starts; leave "
                "places out, or the arm with partition leave-one-out"
            )
        if self.places is not None and self.data.residence == "disk":
            raise ValueError(
                f'places = {self.places}: hospitals on disk can neither join nor leave; set data.residence = "memory"'
            )
        if self.places is not None and self.privacy.sampler == "cyclic":
            raise ValueError(
                f"places = {self.places}: hospitals take turns under sampler cyclic, and one that came back in another "
                "place would have two; leave places out, or choose another sampler"
            )
        if self.places is not None and "patient" in {self.privacy.unit, *(arm.unit for arm in self.arms)}:
            raise ValueError(
                f"places = {self.places}: patients are accounted for hospitals that stay; leave places out, or set "
                'privacy.unit = "hospital"'
            )
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"arms.name = {names}: expected at least one arm and different names")
        return self

    @property
    def stages(self) -> dict[str, SegmentationStage | ClassificationStage]:
        """The stages that there are, by the name of their task, in the order in which they are trained."""
        found = {"segmentation": self.segmentation, "classification": self.classification}
        return {name: stage for name, stage in found.items() if stage is not None}

    @property
    def split_seed(self) -> int:
        """Seed of the split of patients."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

    @classmethod
    def example(cls) -> "StudyConfig":
        """All sections filled with their defaults, for `capsfl train --help`."""
        return cls(phantom=PhantomConfig(), segmentation=SegmentationStage(), classification=ClassificationStage())

    def digest(self) -> str:
        """SHA-256 of what decides the result: all but run folder, jobs, device layout, residence and page."""
        left_out: Any = {"out": True, "devices": True, "jobs": True, "data": {"residence"}, "report": True}
        table = self.model_dump(mode="json", exclude=left_out)
        return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def arm(self, arm: ArmConfig) -> "StudyConfig":
        """The configuration of one arm alone."""
        fields = ("clip_norm", "noise_multiplier", "unit", "expected_patients")
        changes: dict[str, Any] = {name: value for name in fields if (value := getattr(arm, name)) is not None}
        if not arm.federates:
            # One holder of all records, or a hospital alone, has no cohort to draw and no crowd to hide in. Its
            # patients can still hide in each other, where an arm asks for that noise.
            alone = {"sampler": "all", "cohort": None, "truncation": None, "noise_multiplier": 0.0}
            changes = alone | {"noise": "independent", "bands": None} | changes
            changes["target_epsilon"] = None
            if not changes["noise_multiplier"]:
                changes["unit"] = "hospital"
        if changes.get("unit", self.privacy.unit) == "hospital":
            changes |= {"expected_patients": None, "patient_truncation": None}
        replaced: dict[str, Any] = {"privacy": self.privacy.model_copy(update=changes), "arms": (arm,)}
        if arm.seed is not None:
            data = self.data.model_copy(update={"split_seed": self.split_seed})
            replaced |= {"seed": arm.seed, "data": data}
        if not arm.federates:
            replaced["consensus"] = None  # one holder of records has nobody to decide with
        if arm.model is not None and (stage := self.classification) is not None:
            replaced["classification"] = type(stage).model_validate(dict(stage) | {"model": arm.model})
        return self.model_copy(update=replaced)


def load_config(path: Path) -> StudyConfig:
    """Reads and validates a study's TOML file.

    Raises:
        ConfigError: unreadable file, malformed TOML, or fields that are unknown, of a wrong type or out of range.
    """
    table = read_toml(path)
    try:
        # JSON rather than Python objects: strict mode then takes arrays for tuples, and still no bool for an int.
        return StudyConfig.model_validate_json(json.dumps(table))
    except ValidationError as error:
        raise ConfigError(explain(error, str(path))) from error


def choose_by_name(config: StudyConfig, words: Sequence[str]) -> StudyConfig:
    """Puts in what `--classification.model.name`, `--segmentation.model.name`, `--data.collection.name` ask for.

    A network has fields of its own, so what the file says about another one is dropped; options below the name are
    then read against the new section.

    Args:
        config: as the file says it.
        words: the command line; `--option value` or `--option=value`.

    Raises:
        ConfigError: an unknown network or collection, or one that does not fit the section.
    """
    options = dict(pairwise(words)) | dict(word.split("=", 1) for word in words if "=" in word)
    collection = options.get("--data.collection.name")
    if collection is not None and config.data.collection is None:
        try:
            chosen = CollectionConfig.model_validate({"name": collection})
        except ValidationError as error:
            raise ConfigError(explain(error, "capsfl train", section="data.collection")) from error
        config = config.model_copy(update={"data": config.data.model_copy(update={"collection": chosen})})
    for name, section in config.stages.items():
        network = options.get(f"--{name}.model.name")
        if network is None or network == section.model.name:
            continue
        model = named_network(network) if name == "classification" else {"name": network}
        try:
            changed = type(section).model_validate(dict(section) | {"model": model})
        except ValidationError as error:
            raise ConfigError(explain(error, "capsfl train", section=name)) from error
        config = config.model_copy(update={name: changed})
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file whose every value JSON can say too.

    Raises:
        ConfigError: unreadable file, malformed TOML, or a date, time, infinity or NaN.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a readable TOML file, such as configs/demo.toml") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    _refuse_unportable(table, path, ())
    return table


def _refuse_unportable(value: Any, path: Path, trail: tuple[str, ...]) -> None:
    """Refuses what TOML can say and JSON cannot: dates, times, infinities and NaN."""
    field = ".".join(trail)
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_unportable(item, path, (*trail, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unportable(item, path, (*trail, str(index)))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: {field} = {value}: expected a finite number")
    elif not isinstance(value, (str, int, float, bool)):
        raise ConfigError(f"{path}: {field} = {value}: dates and times have no meaning here")
