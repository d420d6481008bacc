"""MosMedData (Morozov et al. 2020): 1,110 studies by severity, fifty of them with masks."""

import re
from pathlib import Path

from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.entries import Collection, ScanEntry
from capsfl.ct.collections.layout import find, some, wrong
from capsfl.ct.errors import WrongLayout

CLASSES = ("CT-0", "CT-1", "CT-2", "CT-3", "CT-4")
WHAT = "MosMedData"
STUDY = re.compile(r"(study_\d+)\.nii(?:\.gz)?")
MASK = re.compile(r"(study_\d+)_mask\.nii(?:\.gz)?")


def read_mosmed(root: Path, config: CollectionConfig) -> Collection:
    """Read MosMedData: `studies/CT-{0..4}/study_XXXX.nii.gz` and `masks/study_XXXX_mask.nii.gz`.

    CT-0 is no sign of viral pneumonia, CT-4 more than three quarters of the lung; with `labels = "disease"` CT-1 to
    CT-4 are one class. A study is a patient. The masks mark ground glass and consolidation.

    Raises:
        WrongLayout: a class folder is absent, holds something else, or a mask has no study.
    """
    studies = find(root, "studies", "COVID19_1110/studies", what=WHAT)
    masks: dict[str, Path] = {}
    if (studies.parent / "masks").is_dir():
        for path in sorted((studies.parent / "masks").iterdir()):
            if match := MASK.fullmatch(path.name):
                masks[match[1]] = path
    entries = []
    for severity, name in enumerate(CLASSES):
        folder = find(studies, name, what=f"the studies of {WHAT}")
        files = [(match[1], path) for path in sorted(folder.iterdir()) if (match := STUDY.fullmatch(path.name))]
        if not files:
            raise wrong(folder, f"a class of {WHAT}", "study_XXXX.nii.gz")
        label = severity if config.labels == "all" else int(severity > 0)
        entries += [ScanEntry(study, "mosmed", path, label=label, mask=masks.pop(study, None)) for study, path in files]
    if masks:
        raise WrongLayout(studies.parent, f"masks without a study ({some(masks)})", "restore the studies")
    if config.mask == "lungs":
        entries = [ScanEntry(entry.patient, entry.hospital, entry.image, label=entry.label) for entry in entries]
    classes = CLASSES if config.labels == "all" else ("CT-0", "CT-1 to CT-4")
    return Collection(tuple(entries), classes)
