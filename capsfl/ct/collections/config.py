"""Which collection a folder holds, and how its patients become hospitals."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from capsfl.settings import Settings

CollectionName = Literal[
    "manifest",
    "covid-ct",
    "covidx-ct",
    "cc-19",
    "mosmed",
    "covid-19-ct-seg",
    "sars-cov-2-ct",
    "nifti-folder",
    "image-folder",
    "dicom-folder",
]


ONLY_FOR: dict[str, tuple[str, ...]] = {
    "classes": ("image-folder", "cc-19"),
    "patient_pattern": ("image-folder",),
    "mask": ("covid-19-ct-seg", "mosmed"),
    "mask_threshold": ("nifti-folder",),
    "pictures": ("sars-cov-2-ct",),
    "series": ("dicom-folder", "cc-19"),
}


class CollectionConfig(Settings):
    """A public collection, or a folder tree without a manifest."""

    name: CollectionName
    """The layout of the folder; `manifest` is the CSV with one row per scan."""
    hospitals: Literal["collection", "scanner", "even", "dirichlet"] = "collection"
    """Who holds which patient: the collection's own sites (one hospital where it names none), one hospital per
    scanner model, or a seeded draw, even or with class proportions from Dirichlet(alpha). All scans of a person stay in
    one hospital, that of the first."""
    count: int = Field(default=3, ge=1, le=10_000)
    """Hospitals of a seeded draw."""
    alpha: float = Field(default=0.5, gt=0, le=1e6)
    """Concentration of `dirichlet`: small is skewed, large is even."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of drawn hospitals and splits."""
    split: Literal["official", "drawn", "study"] = "official"
    """The collection's own lists where it has them, else the study draws; or drawn here; or always by the study."""
    test_fraction: float = Field(default=0.3, ge=0, lt=1)
    """Share of every hospital's patients for `split = "drawn"`."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of every hospital's patients for `split = "drawn"`."""
    labels: Literal["disease", "all"] = "disease"
    """COVID against the rest, or every class of the collection."""
    classes: tuple[str, ...] = ()
    """Class folders in the order of their labels, the one without disease first; guessed by name when empty."""
    patient_pattern: str = ""
    """For image-folder: a regular expression whose first group is the patient in a picture's path below its class."""
    mask: Literal["lesion", "lungs"] = "lesion"
    """Which truth, where a collection has both."""
    mask_threshold: float = 0.5
    """For nifti-folder: stored values from here on are inside the mask."""
    table: str = ""
    """A CSV beside the collection, its path from the collection's folder: `patient` (or `series`, or `folder`), and
    any of hospital, scanner, label, split, which replace what folders and tags say."""
    pictures: str = ""
    """For sars-cov-2-ct: a CSV beside the collection with columns picture and patient."""
    leave_out: tuple[str, ...] = ()
    """Patients to leave out, under the names that the preflight and the index give them."""
    series: Literal["largest", "every"] = "largest"
    """Of a patient with several series the one with most slices, or every one as a scan of its own."""
    side: int = Field(default=64, ge=16, le=1024)
    """Pixels along each side of a picture as it is stored; originals that are smaller are blurred, which can leak."""
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    """How a picture becomes a square: both sides resized to the same length; the central square; black bars."""
    levels: Literal["standardized", "kept"] = "standardized"
    """Give every stored picture the same mean and spread of grey, or keep the window that its publisher chose."""

    @field_validator("patient_pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return pattern

    @model_validator(mode="after")
    def _options_fit_the_collection(self) -> "CollectionConfig":
        for option, names in ONLY_FOR.items():
            if self.name not in names and getattr(self, option) != type(self).model_fields[option].default:
                value = getattr(self, option)
                raise ValueError(
                    f"{option} = {value!r}: of {' and '.join(names)} alone, not of {self.name}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _room_to_train(self) -> "CollectionConfig":
        if self.test_fraction + self.validation_fraction >= 1:
            raise ValueError(
                f"test_fraction = {self.test_fraction}: with validation_fraction = {self.validation_fraction} nobody "
                "is left to train on; lower one"
            )
        return self
