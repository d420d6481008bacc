"""Writes hospitals to a store one after the other, so that they need never fit in memory together."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from capsfl.federated.hospitals import Hospitals
from capsfl.federated.store_format import (
    FORMAT,
    RECORD,
    UNFINISHED,
    VERSION,
    HospitalStoreError,
    Place,
    cause_of,
    checksum_of,
    connect,
    describe_structure,
    read_value,
)

SHARD_BYTES = 4 << 20
"""Hospitals smaller than this share a file, up to as many bytes, so that 1e5 small ones are not 1e5 files."""
SHARD_HOSPITALS = 256
"""The most hospitals in a file: its index (16 bytes each) is read before the first of them."""
UNKNOWN = 2**31 - 1
"""Hospitals an array is made for while nobody has counted them; cut down when the last one is written."""


@dataclass(frozen=True)
class _Leaf:
    """One array of a hospital: shape without the hospital axis, and type."""

    shape: tuple[int, ...]
    dtype: str


def write_hospitals_store(path: Place, hospitals: Iterable[tuple[str, Any]], *, capacity: int) -> None:
    """Writes hospitals one after the other; in memory are one of them, or `SHARD_BYTES` of small ones.

    The file that makes it a store is written last, so a killed write leaves none that opens, and can be repeated.

    Args:
        path: where; must be empty, or hold an unfinished store.
        hospitals: name and pytree of arrays `(records, ...)` of each; dicts, lists and tuples of arrays.
        capacity: records the largest hospital may have; the others are padded to it with zeros.

    Raises:
        HospitalStoreError: the place holds something else or cannot be written, or no hospital is given.
        ValueError: a hospital has no or too many records, or differs from the first in structure, shape or type.
    """
    if capacity < 1:
        raise ValueError(f"capacity = {capacity}: must be at least 1")
    base, where, context = connect(path)
    _make_room(base, where)
    names: list[str] = []
    counts: list[int] = []
    arrays: list[Any] = []
    leaves: list[_Leaf] = []
    buffers: list[np.ndarray] = []
    seen: set[str] = set()
    template: Any = None
    for name, tree in hospitals:
        found, count = _check(name, tree, capacity)
        if name in seen:
            raise ValueError(f"hospitals[{name!r}]: given twice; names must differ")
        seen.add(name)
        structure = jax.tree.structure(tree)
        shapes = [_Leaf((capacity, *leaf.shape[1:]), leaf.dtype.name) for leaf in found]
        if not arrays:
            leaves, template = shapes, structure
            plain = describe_structure(name, jax.tree.unflatten(structure, range(len(found))))
            share = _hospitals_per_file(leaves)
            arrays = [_create(base / f"leaves/{i}/", leaf, share, context, where) for i, leaf in enumerate(leaves)]
            buffers = [np.zeros((share, *leaf.shape), array.dtype) for leaf, array in zip(leaves, found, strict=True)]
        if structure != template or shapes != leaves:
            raise ValueError(f"hospitals[{name!r}]: records {structure} {shapes} differ from the first hospital's")
        slot = len(names) % share
        for buffer, leaf in zip(buffers, found, strict=True):
            buffer[slot, :count], buffer[slot, count:] = leaf, 0
        names.append(name)
        counts.append(count)
        if slot == share - 1:
            _flush(where, arrays, buffers, len(names) - share, share)
    if not names:
        raise ValueError("hospitals: none given; expected pairs of a name and arrays")
    rest = len(names) % share
    if rest:
        _flush(where, arrays, buffers, len(names) - rest, rest)
    for array in arrays:
        # Only the shape: nothing lies beyond, and looking for it would take as long as there could be chunks.
        limits = [len(names)] + [None] * (array.rank - 1)
        _finish(where, array.resize(exclusive_max=limits, resize_metadata_only=True))
    body = {
        "format": FORMAT,
        "version": VERSION,
        "capacity": capacity,
        "structure": plain,
        "leaves": [{"shape": leaf.shape, "dtype": leaf.dtype} for leaf in leaves],
        "names": names,
        "counts": counts,
    }
    _finish(where, base.write(RECORD, json.dumps({"checksum": checksum_of(body), **body}).encode()))
    _finish(where, base.write(UNFINISHED, None))


def rewrite_hospitals_store(folder: Path, hospitals: Hospitals) -> None:
    """Writes stacked hospitals to a folder, in place of whatever store an earlier start of the run left there.

    Raises:
        HospitalStoreError: the folder cannot be written.
    """
    shutil.rmtree(folder, ignore_errors=True)

    def unstacked() -> Iterator[tuple[str, Any]]:
        for row, (name, count) in enumerate(zip(hospitals.names, hospitals.counts, strict=True)):
            yield name, jax.tree.map(lambda leaf, row=row, count=count: leaf[row, :count], hospitals.records)

    write_hospitals_store(folder, unstacked(), capacity=hospitals.capacity)


def _make_room(base: Any, where: str) -> None:
    """Clears an unfinished store away; anything else is left alone."""
    if read_value(base, RECORD, where) is not None:
        raise HospitalStoreError(f"{where}: holds a finished store; delete it or choose another place")
    if read_value(base, UNFINISHED, where) is None and _finish(where, base.list()):
        raise HospitalStoreError(f"{where}: not empty and no store of hospitals; choose another place")
    _finish(where, base.write(UNFINISHED, b"being written, or its writer was killed\n"))
    _finish(where, base.delete_range(tensorstore.KvStore.KeyRange("leaves/", "leaves0")))


def _check(name: str, tree: Any, capacity: int) -> tuple[list[np.ndarray], int]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(f"hospitals[{name!r}]: arrays disagree on the number of records: {[x.shape for x in leaves]}")
    count = leaves[0].shape[0]
    if not 1 <= count <= capacity:
        raise ValueError(f"hospitals[{name!r}]: {count} records; must be 1 to capacity = {capacity}")
    return leaves, count


def _hospitals_per_file(leaves: Sequence[_Leaf]) -> int:
    sizes = [int(np.prod(leaf.shape)) * tensorstore.dtype(leaf.dtype).numpy_dtype.itemsize for leaf in leaves]
    return max(1, min(SHARD_HOSPITALS, SHARD_BYTES // max(1, sum(sizes))))


def _create(base: Any, leaf: _Leaf, share: int, context: Any, where: str) -> Any:
    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 1}},
        {"name": "crc32c"},
    ]
    if share > 1:
        inner = {"chunk_shape": [1, *leaf.shape], "codecs": codecs}
        codecs = [{"name": "sharding_indexed", "configuration": inner}]
    metadata = {
        "shape": [UNKNOWN, *leaf.shape],
        "data_type": leaf.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [share, *leaf.shape]}},
        "codecs": codecs,
    }
    # A hospital of zeros is written like any other, so that a missing chunk is always a loss.
    spec = {"driver": "zarr3", "kvstore": base.spec().to_json(), "metadata": metadata}
    spec["store_data_equal_to_fill_value"] = True
    return _finish(where, tensorstore.open(spec, create=True, context=context))


def _flush(where: str, arrays: Sequence[Any], buffers: Sequence[np.ndarray], start: int, count: int) -> None:
    written = [a[start : start + count].write(b[:count]) for a, b in zip(arrays, buffers, strict=True)]
    for future in written:
        _finish(where, future)


def _finish(where: str, future: Any) -> Any:
    """Waits for a write; its failure is told apart from one of whoever draws the hospitals."""
    try:
        return future.result()
    except (ValueError, OSError, RuntimeError) as error:  # TensorStore reports a full disk as ValueError
        raise HospitalStoreError(
            f"{where}: cannot be written ({cause_of(error)}); free space or choose another place"
        ) from error
