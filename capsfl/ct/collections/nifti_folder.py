"""NIfTI volumes with masks beside them or in a folder of their own."""

import re
from pathlib import Path

from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.entries import ScanEntry, distinct_names, numbered
from capsfl.ct.collections.layout import files_below, some, wrong
from capsfl.ct.collections.manifest import is_nifti
from capsfl.ct.collections.table import Found
from capsfl.ct.errors import WrongLayout

SUFFIX = re.compile(r"[-_.](?:msk|mask|masks|seg|segmentation|label|labels|gt)$", re.IGNORECASE)
CHANNEL = re.compile(r"_0000$")
MASK_FOLDERS = {"mask", "masks", "label", "labels", "labelstr", "labelsts", "seg", "segmentations"}
IMAGE_FOLDERS = {"image", "images", "imagestr", "imagests", "ct", "scans", "volumes"}


def read_nifti_folder(root: Path, config: CollectionConfig) -> tuple[tuple[Found, ...], tuple[str, ...], list[str]]:
    """Read a tree of NIfTI volumes; returns entries, classes and notes.

    A mask has its volume's name in a folder called masks or labels, or its volume's name with `-msk`, `_mask`, `_seg`
    and the like at its end. Where the volumes lie in several folders, the first folder below the top is the hospital.
    Patients get numbers for names; labels come from `config.table`.

    Raises:
        Unreadable: a folder of the tree is locked.
        WrongLayout: no volumes, two volumes or masks of one name, or a mask without a volume.
    """
    files = [path for path in sorted(files_below(root)) if is_nifti(path)] if root.is_dir() else []
    volumes: dict[tuple[str, ...], Path] = {}
    masks: dict[tuple[str, ...], Path] = {}
    for path in files:
        folders, stem = path.relative_to(root).parent.parts, path.name.removesuffix(".gz").removesuffix(".nii")
        is_mask = bool(SUFFIX.search(stem)) or any(folder.lower() in MASK_FOLDERS for folder in folders)
        place = tuple(folder for folder in folders if folder.lower() not in MASK_FOLDERS | IMAGE_FOLDERS)
        key: tuple[str, ...] = (*place, SUFFIX.sub("", stem) if is_mask else CHANNEL.sub("", stem))
        kind = masks if is_mask else volumes
        if key in kind:
            raise WrongLayout(path, f"a second {'mask' if is_mask else 'volume'} beside {kind[key].name}", "remove one")
        kind[key] = path
    if not volumes:
        raise wrong(root, "a folder of NIfTI volumes", "*.nii.gz")
    if alone := [path.name for key, path in masks.items() if key not in volumes]:
        raise WrongLayout(root, f"masks without a volume ({some(alone)})", "name a mask like its volume")
    sites = sorted({key[0] if len(key) > 1 else "" for key in volumes})
    hospitals = distinct_names(sites) if len(sites) > 1 else dict.fromkeys(sites, "local")
    names = numbered(["/".join(key) for key in volumes], "patient")
    found = [
        Found(
            ScanEntry(
                names["/".join(key)],
                hospitals[key[0] if len(key) > 1 else ""],
                path,
                mask=masks.get(key),
                mask_threshold=config.mask_threshold,
            ),
            "/".join(key),
            folder=path.parent.relative_to(root).as_posix(),
        )
        for key, path in volumes.items()
    ]
    return tuple(found), ("negative", "positive"), []
