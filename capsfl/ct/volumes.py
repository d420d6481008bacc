"""Standard volumes on disk: Zarr 3 groups, compressed, checksummed, written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from capsfl.ct.errors import CorruptVolume, StorageError
from capsfl.ct.normalize import StandardVolume
from capsfl.ct.scan import ScanSource, as_rows

FORMAT = "capsfl-volume"
VERSION = 1
CHUNK = 128
"""Chunk side: one chunk for a tiny volume, 64 of 4 MB for a full one, which is how volumes are read."""

OUTSIDE = {"hu": -1000, "valid": False}


def write_volume(path: Path, volume: StandardVolume, *, attributes: Mapping[str, Any]) -> None:
    """Write a volume as a Zarr 3 group: `hu` int16, `valid` bool, `masks/<name>` uint8.

    It is written beside its place and renamed, so a reader sees the old volume, the new one or none.

    Args:
        path: the group's folder; replaced if it exists.
        volume: the standard volume; HU are rounded to integers.
        attributes: JSON values kept with it (provenance, configuration hash); `checksum` is ours.

    Raises:
        StorageError: the place is read-only or full; nothing half-written is left.
        ValueError: a mask's name is not a plain word, or the attributes hold `checksum`.
    """
    path = Path(path)
    if "checksum" in attributes:
        raise ValueError("attributes.checksum: the volume's own key; use another name")
    for name in volume.masks:
        if not name.isidentifier():
            raise ValueError(f"masks.{name}: not a plain word; use letters, digits and underscores")
    arrays = _stored_arrays(volume)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": _checksum(arrays, volume.affine),
        "affine": as_rows(volume.affine),
        "source_affine": as_rows(volume.source_affine),
        "source_shape": volume.source_shape,
        "source": asdict(volume.source),
        "cropped_lung_fraction": volume.cropped_lung_fraction,
        "masks": sorted(volume.masks),
        "attributes": dict(attributes),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, array in arrays.items():
            _write_array(partial / name, array, fill_value=OUTSIDE.get(name, 0))
        if volume.masks:
            _write_group(partial / "masks", {})
        _write_group(partial, {"capsfl": record})
        _replace(partial, path)
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore reports a full disk as ValueError
        shutil.rmtree(partial, ignore_errors=True)
        cause = _cause(error)
        raise StorageError(f"{path}: cannot be written ({cause}); free space or choose a writable folder") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_volume(path: Path) -> tuple[StandardVolume, dict[str, Any]]:
    """Read a volume and its attributes (with `checksum` added), after checking the content.

    Raises:
        CorruptVolume: absent, incomplete, damaged, or of another format version.
    """
    path = Path(path)
    record = _record(path)
    names = ["hu", "valid", *(f"masks/{name}" for name in record["masks"])]
    try:
        opened = [tensorstore.open({"driver": "zarr3", "kvstore": _store(path / name)}, read=True) for name in names]
        reads = [handle.result().read() for handle in opened]
        arrays = {name: np.asarray(read.result()) for name, read in zip(names, reads, strict=True)}
    except (OSError, ValueError, RuntimeError) as error:
        cause = _cause(error)
        raise CorruptVolume(path, f"unreadable ({cause})", "delete it and ingest the scan again") from error
    affine = np.array(record["affine"], np.float64)
    if _checksum(arrays, affine) != record["checksum"]:
        raise CorruptVolume(path, "the checksum does not match", "delete it and ingest the scan again")
    shape = record["source_shape"]
    volume = StandardVolume(
        hu=arrays["hu"].astype(np.float32),
        valid=arrays["valid"],
        masks={name: arrays[f"masks/{name}"].astype(bool) for name in record["masks"]},
        affine=affine,
        source_affine=np.array(record["source_affine"], np.float64),
        source_shape=(shape[0], shape[1], shape[2]),
        source=ScanSource.from_json(record["source"]),
        cropped_lung_fraction=record["cropped_lung_fraction"],
    )
    return volume, {**record["attributes"], "checksum": record["checksum"]}


def read_attributes(path: Path) -> dict[str, Any]:
    """Read a volume's attributes (with `checksum` added) without its arrays.

    Raises:
        CorruptVolume: absent, incomplete, or of another format version.
    """
    record = _record(Path(path))
    return {**record["attributes"], "checksum": record["checksum"]}


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / "zarr.json").read_text())["attributes"]["capsfl"]
        version = record["format"], record["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptVolume(path, "not a stored volume", "ingest the scan again") from error
    if version != (FORMAT, VERSION):
        raise CorruptVolume(path, f"format {version[0]} {version[1]}, not {FORMAT} {VERSION}", "ingest the scan again")
    return record


def _stored_arrays(volume: StandardVolume) -> dict[str, np.ndarray]:
    arrays = {"hu": np.rint(volume.hu).astype(np.int16), "valid": np.asarray(volume.valid, bool)}
    for name in sorted(volume.masks):
        arrays[f"masks/{name}"] = np.asarray(volume.masks[name], bool).astype(np.uint8)
    return arrays


def _checksum(arrays: Mapping[str, np.ndarray], affine: np.ndarray) -> str:
    """SHA-256 over names, types, shapes and little-endian bytes of the arrays and the affine."""
    digest = hashlib.sha256()
    for name, array in sorted({**arrays, "affine": affine}.items()):
        little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        digest.update(f"{name} {little.dtype.str} {little.shape}\n".encode())
        digest.update(little.data)
    return f"sha256:{digest.hexdigest()}"


def _write_array(path: Path, array: np.ndarray, *, fill_value: int | bool) -> None:
    path.mkdir(parents=True)
    chunk = [min(CHUNK, size) for size in array.shape]
    compression = {"cname": "zstd", "clevel": 3, "shuffle": "shuffle", "typesize": array.dtype.itemsize}
    metadata = {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": compression},
            {"name": "crc32c"},
        ],
        "dimension_names": ["z", "y", "x"],
        "fill_value": fill_value,
    }
    spec = {"driver": "zarr3", "kvstore": _store(path), "metadata": metadata}
    tensorstore.open(spec, create=True).result().write(array).result()


def _cause(error: Exception) -> str:
    """What went wrong in a few words; TensorStore's own text is longer than a line, paths included."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if str(error).startswith("RESOURCE_EXHAUSTED"):
        return os.strerror(errno.ENOSPC)
    return str(error).splitlines()[0][:160]


def _store(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{path}/"}


def _write_group(path: Path, attributes: dict[str, Any]) -> None:
    record = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (path / "zarr.json").write_text(json.dumps(record, indent=1, allow_nan=False))


def _replace(partial: Path, path: Path) -> None:
    """Rename a folder over another; a crash in between leaves the old one under a hidden name, never half."""
    if not path.exists():
        os.rename(partial, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        with suppress(OSError):
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
