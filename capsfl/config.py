"""The configuration of a study: one TOML file, validated strictly, overridden from the command line."""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from capsfl.ct.normalize import VolumeConfig
from capsfl.ct.phantom import PhantomConfig
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import RoundsConfig
from capsfl.learning.classification import ClassificationConfig
from capsfl.learning.segmentation import SegmentationConfig
from capsfl.privacy.plan import PrivacyConfig
from capsfl.settings import Settings, explain


class ConfigError(ValueError):
    """A configuration that cannot be used; each line names the file, the dotted field, the value and the remedy."""


class SegmentationStage(SegmentationConfig, RoundsConfig):
    """Segmentation: what is marked, by which network, trained how."""


class ClassificationStage(ClassificationConfig, RoundsConfig):
    """Classification: which slices, which network, trained how."""


class DataConfig(Settings):
    """Where scans come from and how patients are split."""

    source: str = ""
    """A manifest (CSV), a folder holding manifest.csv, a DICOM series or a NIfTI file; empty for the phantom."""
    root: str = ""
    """Folder that the manifest's paths start from; empty for the manifest's own folder."""
    volumes: VolumeConfig = VolumeConfig()
    """The standard volume."""
    field: tuple[int, int, int] | None = None
    """Central voxels (z, y, x) that the models see, multiples of 8; the whole volume when absent."""
    test_fraction: float = Field(default=0.3, ge=0, lt=1)
    """Share of every hospital's patients that is never trained on, where the manifest gives no split."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of every hospital's patients for the curves and the threshold, where the manifest gives no split."""
    on_error: Literal["raise", "skip"] = "raise"
    """Whether a scan that cannot be read stops the run or is left out by name."""
    residence: Literal["memory", "disk"] = "memory"
    """Where federated hospitals keep their training records: in memory, or in the run folder, read cohort by cohort
    while the round before trains; for more hospitals than memory holds. The result is the same bit for bit."""


class ArmConfig(Settings):
    """One of the trainings that a study compares."""

    name: str = Field(default="federated", pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    """Folder of the arm inside the study: lower-case letters, digits, `-`, `_`."""
    partition: Literal["hospitals", "pooled", "local"] = "hospitals"
    """Federated over the hospitals, one hospital holding all records, or every hospital alone."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Replaces privacy.clip_norm."""
    noise_multiplier: float | None = Field(default=None, ge=0)
    """Replaces privacy.noise_multiplier."""
    unit: Literal["hospital", "patient"] | None = None
    """Replaces privacy.unit."""
    expected_patients: int | None = Field(default=None, ge=1)
    """Replaces privacy.expected_patients."""


class StudyConfig(Settings):
    """A study: data, stages, privacy, and the arms that are trained side by side."""

    out: str = "runs/study"
    """Run folder; training resumes from it when it is not empty."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of splits, weights, sampling and noise."""
    phantom: PhantomConfig | None = None
    """Chest-CT phantom to generate when data.source is empty."""
    data: DataConfig = DataConfig()
    """Scans."""
    segmentation: SegmentationStage | None = None
    """First stage; always needed."""
    classification: ClassificationStage | None = None
    """Second stage; absent to skip it."""
    privacy: PrivacyConfig = PrivacyConfig(clip_norm=10.0)
    """Sampling, clipping and noise, of hospitals or of patients (`privacy.unit`)."""
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

    @model_validator(mode="after")
    def _consistent(self) -> "StudyConfig":
        if self.segmentation is None and self.classification is None:
            raise ValueError("segmentation: neither [segmentation] nor [classification] is given; add a stage")
        if self.classification is not None and self.segmentation is None:
            raise ValueError("segmentation: absent, but [classification] looks at masked slices; add [segmentation]")
        if not self.data.source and self.phantom is None:
            raise ValueError("data.source: empty, and there is no [phantom]; name a manifest or add [phantom]")
        for name in ("segmentation", "classification"):
            if self.data.residence == "disk" and (stage := getattr(self, name)) is not None and stage.scaffold:
                raise ValueError(
                    f'data.residence = "disk": {name}.scaffold keeps a copy of the model for every hospital in memory; '
                    "switch scaffold off, or keep the records in memory"
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

    @classmethod
    def example(cls) -> "StudyConfig":
        """All sections filled with their defaults, for `capsfl train --help`."""
        return cls(phantom=PhantomConfig(), segmentation=SegmentationStage(), classification=ClassificationStage())

    def digest(self) -> str:
        """SHA-256 of what decides the result: all but the run folder, the jobs, the device layout and the residence."""
        left_out: Any = {"out": True, "devices": True, "jobs": True, "data": {"residence"}}
        table = self.model_dump(mode="json", exclude=left_out)
        return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def arm(self, arm: ArmConfig) -> "StudyConfig":
        """The configuration of one arm alone."""
        replaced = ("clip_norm", "noise_multiplier", "unit", "expected_patients")
        changes: dict[str, Any] = {name: value for name in replaced if (value := getattr(arm, name)) is not None}
        if arm.partition != "hospitals":
            # One holder of all records, or a hospital alone, has no cohort to draw and no crowd to hide in. Its
            # patients can still hide in each other, where an arm asks for that noise.
            alone = {"sampler": "all", "cohort": None, "truncation": None, "noise_multiplier": 0.0}
            changes = alone | {"noise": "independent", "bands": None} | changes
            changes["target_epsilon"] = None
            if not changes["noise_multiplier"]:
                changes["unit"] = "hospital"
        if changes.get("unit", self.privacy.unit) == "hospital":
            changes |= {"expected_patients": None, "patient_truncation": None}
        return self.model_copy(update={"privacy": self.privacy.model_copy(update=changes), "arms": (arm,)})


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
