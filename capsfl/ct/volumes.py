"""Standard volumes on disk or in an object store: sharded Zarr 3, compressed, checksummed, whole or not at all."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from capsfl.ct.errors import CorruptVolume
from capsfl.ct.normalize import StandardVolume
from capsfl.ct.scan import ScanSource, as_rows
from capsfl.ct.zarr_group import (
    Place,
    StoredArray,
    brief_checksum,
    checksum,
    parse_place,
    read_group,
    read_record,
    read_region,
    write_group,
)

FORMAT = "capsfl-volume"
VERSION = 4
"""4 since the checksum is `brief_checksum`, 3 since blocks of nothing but air are stored, so that a lost one is told
from air. Version 3, version 2, where they are not, and version 1, whose arrays are folders of chunks instead of one
shard, can still be read."""
COMPLETE_SINCE, BRIEF_SINCE = 3, 4

KIND: Any = {"format": FORMAT, "versions": (1, 2, 3, VERSION)}
AXES = ("z", "y", "x")
OUTSIDE = {"hu": -1000, "valid": False}


def write_volume(path: Place, volume: StandardVolume, *, attributes: Mapping[str, Any]) -> None:
    """Write a volume as a Zarr 3 group: `hu` int16, `valid` bool, `masks/<name>` uint8, a file each.

    A reader sees the old volume, the new one or none.

    Args:
        path: the group's folder or URL (`file://`, `s3://`, `gs://`, `memory://`); replaced if it exists, see
            `write_group`.
        volume: the standard volume.
        attributes: JSON values kept with it (provenance, configuration hash); `checksum` is ours.

    Raises:
        StorageError: the place is read-only or full; nothing half-written is left.
        ValueError: a mask's name is not a plain word, or the attributes hold `checksum`.
    """
    if "checksum" in attributes:
        raise ValueError("attributes.checksum: the volume's own key; use another name")
    for name in volume.masks:
        if not name.isidentifier():
            raise ValueError(f"masks.{name}: not a plain word; use letters, digits and underscores")
    arrays = {name: StoredArray(values, AXES, OUTSIDE.get(name, 0)) for name, values in _stored(volume).items()}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "affine": as_rows(volume.affine),
        "source_affine": as_rows(volume.source_affine),
        "source_shape": volume.source_shape,
        "source": asdict(volume.source),
        "cropped_lung_fraction": volume.cropped_lung_fraction,
        "masks": sorted(volume.masks),
        "attributes": dict(attributes),
    }
    affine = np.asarray(volume.affine, np.float64)
    write_group(path, arrays, record=record, also_checked={"affine": affine}, digest=brief_checksum)


def read_volume(path: Place) -> tuple[StandardVolume, dict[str, Any]]:
    """Read a volume and its attributes (with `checksum` added), after checking the content.

    Raises:
        CorruptVolume: absent, incomplete, damaged, or of another format version.
    """
    record, arrays = read_group(path, _arrays_of, **KIND)
    affine = np.array(record["affine"], np.float64)
    digest = brief_checksum if record["version"] >= BRIEF_SINCE else checksum
    if digest({**arrays, "affine": affine}) != record["checksum"]:
        raise CorruptVolume(parse_place(path), "the checksum does not match", "delete it and ingest the scan again")
    shape = record["source_shape"]
    volume = StandardVolume(
        hu=arrays["hu"],
        valid=arrays["valid"],
        masks={name: arrays[f"masks/{name}"].view(bool) for name in record["masks"]},
        affine=affine,
        source_affine=np.array(record["source_affine"], np.float64),
        source_shape=(shape[0], shape[1], shape[2]),
        source=ScanSource.from_json(record["source"]),
        cropped_lung_fraction=record["cropped_lung_fraction"],
    )
    return volume, {**record["attributes"], "checksum": record["checksum"]}


def read_slab(path: Place, *, axis: Literal["z", "y", "x"], start: int, stop: int, array: str = "hu") -> np.ndarray:
    """Read neighbouring planes of one array without the rest of the volume.

    Args:
        path: the volume's folder or URL.
        axis: across which direction the planes are cut: z axial, y coronal, x sagittal.
        start: first plane.
        stop: plane after the last.
        array: `hu`, `valid` or `masks/<name>`.

    Returns:
        `(z, y, x)` as stored (int16 HU, bool or uint8), `stop - start` along `axis`.

    Raises:
        CorruptVolume: absent, damaged, or of another format version; a block that is missing is damage, except in
            volumes before version 3, where it stands for air.
        ValueError: the planes lie outside the volume.
    """
    region = tuple(slice(start, stop) if name == axis else slice(None) for name in AXES)
    return read_region(path, array, region, complete_since=COMPLETE_SINCE, **KIND)


def read_attributes(path: Place) -> dict[str, Any]:
    """Read a volume's attributes (with `checksum` added) without its arrays.

    Raises:
        CorruptVolume: absent, incomplete, or of another format version.
    """
    record = _record(path)
    return {**record["attributes"], "checksum": record["checksum"]}


def _record(path: Place) -> dict[str, Any]:
    return read_record(path, **KIND)


def _arrays_of(record: Mapping[str, Any]) -> list[str]:
    return ["hu", "valid", *(f"masks/{name}" for name in record["masks"])]


def _stored(volume: StandardVolume) -> dict[str, np.ndarray]:
    arrays = {"hu": np.ascontiguousarray(volume.hu, np.int16), "valid": np.ascontiguousarray(volume.valid, bool)}
    for name in sorted(volume.masks):
        arrays[f"masks/{name}"] = np.ascontiguousarray(volume.masks[name], bool).view(np.uint8)
    return arrays
