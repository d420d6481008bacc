"""Hospitals larger than memory: one chunk of a TensorStore array per hospital, the next cohort read ahead."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

FORMAT = "capsfl-hospitals"
VERSION = 1
RECORD = "hospitals.json"
UNFINISHED = "unfinished"
SHARD_BYTES = 4 << 20
"""Hospitals smaller than this share a file, up to as many bytes, so that 1e5 small ones are not 1e5 files."""
SHARD_HOSPITALS = 256
"""The most hospitals in a file: its index (16 bytes each) is read before the first of them."""
CACHE_BYTES = 16 << 20
UNKNOWN = 2**31 - 1
"""Hospitals an array is made for while nobody has counted them; cut down when the last one is written."""

Place = Path | str | Mapping[str, Any]
"""A folder, a TensorStore URL (`gs://bucket/hospitals/`), or the JSON of a key-value store."""


class HospitalStoreError(ValueError):
    """A store of hospitals that cannot be written, opened or read."""


@dataclass(frozen=True)
class _Leaf:
    """One array of a hospital: shape without the hospital axis, and type."""

    shape: tuple[int, ...]
    dtype: str


@dataclass
class _Reading:
    """A cohort on its way: the arrays being filled and, by slot, who is read and what to wait for."""

    key: bytes
    leaves: list[np.ndarray]
    pending: list[tuple[int, list[Any]]]

    def cancel(self) -> None:
        for _, futures in self.pending:
            for future in futures:
                future.cancel()


class StoredHospitals:
    """The hospitals of a store, read cohort by cohort; made by `open_hospitals_store`.

    In memory are the names, the counts and at most one cohort read ahead, beside the one that was taken.

    Attributes:
        names: hospital names, in the order of the store.
        counts: `(hospitals,)` int32, how many records each hospital really has.
        capacity: records a hospital can hold: the size of the padded record axis.
    """

    def __init__(
        self, where: str, names: Sequence[str], counts: np.ndarray, capacity: int, structure: Any, arrays: Sequence[Any]
    ) -> None:
        self.names = names
        self.counts = counts
        self.capacity = capacity
        self._where = where
        self._structure = structure
        self._arrays = arrays
        self._ahead: _Reading | None = None

    def __len__(self) -> int:
        return len(self.names)

    def prefetch(self, indices: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Starts to read a cohort for the next `take` of the same; one begun for another cohort is dropped."""
        key = _key(indices, mask)
        if self._ahead is not None:
            if self._ahead.key == key:
                return
            self._ahead.cancel()
            self._ahead = None
        self._ahead = self._start(indices, mask)

    def take(self, indices: np.ndarray, mask: np.ndarray | None = None) -> Any:
        """Returns the records of a cohort: a pytree of host arrays `(slots, records, ...)`.

        Args:
            indices: `(slots,)` positions of the hospitals.
            mask: `(slots,)` bool; slots where it is False are not read and hold zeros. All are read by default.

        Raises:
            HospitalStoreError: a hospital's chunk is missing, damaged or unreachable; the message names it.
            IndexError: an index lies outside the store.
        """
        reading, self._ahead = self._ahead, None
        if reading is not None and reading.key != _key(indices, mask):
            reading.cancel()
            reading = None
        if reading is None:
            reading = self._start(indices, mask)
        for index, futures in reading.pending:
            try:
                for future in futures:
                    future.result()
            except (ValueError, OSError, RuntimeError) as error:
                reading.cancel()
                raise HospitalStoreError(
                    f"{self._where}: hospital {self.names[index]!r} cannot be read ({_cause(error)}); "
                    "restore its file, or write the store again"
                ) from error
        return jax.tree.unflatten(self._structure, reading.leaves)

    def _start(self, indices: np.ndarray, mask: np.ndarray | None) -> _Reading:
        indices = np.asarray(indices)
        wrong = indices[(indices < 0) | (indices >= len(self))]
        if wrong.size:
            raise IndexError(f"{self._where}: hospital {int(wrong[0])} of {len(self)}; indices start at 0")
        leaves = [np.zeros((len(indices), *array.shape[1:]), array.dtype.numpy_dtype) for array in self._arrays]
        pending = []
        for slot, index in enumerate(indices.tolist()):
            if mask is None or mask[slot]:
                reads = zip(leaves, self._arrays, strict=True)
                # Read into its place, since a second copy of the cohort would double what a round holds.
                pending.append((index, [tensorstore.array(leaf[slot]).write(array[index]) for leaf, array in reads]))
        return _Reading(_key(indices, mask), leaves, pending)


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
    base, where, context = _connect(path)
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
            plain = _describe(name, jax.tree.unflatten(structure, range(len(found))))
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
    _finish(where, base.write(RECORD, json.dumps({"checksum": _checksum(body), **body}).encode()))
    _finish(where, base.write(UNFINISHED, None))


def open_hospitals_store(path: Place) -> StoredHospitals:
    """Opens a store; no record is read.

    Raises:
        HospitalStoreError: there is no finished store, or what it says of itself is damaged or does not fit its arrays.
    """
    base, where, context = _connect(path)
    text = _read(base, RECORD, where)
    if text is None:
        started = _read(base, UNFINISHED, where) is not None
        fault = "its writing was not finished" if started else "there is none"
        raise HospitalStoreError(f"{where}: no store of hospitals, {fault}; write it with write_hospitals_store")
    try:
        body = json.loads(text)
        checksum = body.pop("checksum")
        version = body["format"], body["version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HospitalStoreError(f"{where}: {RECORD} is damaged; write the store again") from error
    if version != (FORMAT, VERSION):
        raise HospitalStoreError(f"{where}: format {version[0]} {version[1]}, not {FORMAT} {VERSION}; write it again")
    if checksum != _checksum(body):
        raise HospitalStoreError(f"{where}: {RECORD} does not match its checksum; write the store again")
    names, counts = tuple(body["names"]), np.asarray(body["counts"], np.int32)
    opened = [_open(base / f"leaves/{i}/", context) for i in range(len(body["leaves"]))]
    arrays = []
    for i, (future, leaf) in enumerate(zip(opened, body["leaves"], strict=True)):
        try:
            array = future.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise HospitalStoreError(f"{where}leaves/{i}: unreadable ({_cause(error)}); write it again") from error
        expected = (len(names), *leaf["shape"])
        if array.shape != expected or array.dtype.name != leaf["dtype"]:
            found, wanted = f"{array.dtype.name} {array.shape}", f"{leaf['dtype']} {expected}"
            raise HospitalStoreError(f"{where}leaves/{i}: {found}, expected {wanted}; write it again")
        arrays.append(array)
    structure = jax.tree.structure(_restore(body["structure"]))
    return StoredHospitals(where, names, counts, body["capacity"], structure, arrays)


def _connect(path: Place) -> tuple[Any, str, Any]:
    """The key-value store, its name in messages, and the context that bounds its caches."""
    if isinstance(path, Mapping):
        spec: Any = dict(path)
        where = str(spec.get("path") or spec.get("driver"))
    elif isinstance(path, str) and "://" in path:
        spec, where = path, path
    else:
        where = str(path)
        spec = {"driver": "file", "path": str(Path(path).absolute())}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    try:
        store = tensorstore.KvStore.open(spec, context=context).result()
    except (ValueError, OSError, RuntimeError) as error:
        raise HospitalStoreError(f"{where}: not a place for a store ({_cause(error)})") from error
    store = store if not store.path or store.path.endswith("/") else store / "/"
    return store, where.rstrip("/") + "/", context


def _read(base: Any, key: str, where: str) -> bytes | None:
    try:
        result = base.read(key).result()
    except (ValueError, OSError, RuntimeError) as error:
        raise HospitalStoreError(f"{where}{key}: cannot be read ({_cause(error)})") from error
    return bytes(result.value) if result.state == "value" else None


def _make_room(base: Any, where: str) -> None:
    """Clears an unfinished store away; anything else is left alone."""
    if _read(base, RECORD, where) is not None:
        raise HospitalStoreError(f"{where}: holds a finished store; delete it or choose another place")
    if _read(base, UNFINISHED, where) is None and _finish(where, base.list()):
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


def _open(base: Any, context: Any) -> Any:
    spec = {"driver": "zarr3", "kvstore": base.spec().to_json(), "fill_missing_data_reads": False}
    return tensorstore.open(spec, open=True, read=True, context=context)


def _flush(where: str, arrays: Sequence[Any], buffers: Sequence[np.ndarray], start: int, count: int) -> None:
    written = [a[start : start + count].write(b[:count]) for a, b in zip(arrays, buffers, strict=True)]
    for future in written:
        _finish(where, future)


def _finish(where: str, future: Any) -> Any:
    """Waits for a write; its failure is told apart from one of whoever draws the hospitals."""
    try:
        return future.result()
    except (ValueError, OSError, RuntimeError) as error:  # TensorStore reports a full disk as ValueError
        cause = _cause(error)
        raise HospitalStoreError(f"{where}: cannot be written ({cause}); free space or choose another place") from error


def _describe(name: str, tree: Any) -> Any:
    """A tree of leaf numbers as JSON: lists and tuples are told apart, since jax does."""
    if isinstance(tree, int) or tree is None:
        return tree
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_describe(name, part) for part in tree]}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _describe(name, part) for key, part in tree.items()}}
    raise ValueError(
        f"hospitals[{name!r}]: holds a {type(tree).__name__}; only dicts with names, lists and tuples store"
    )


def _restore(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    ((kind, parts),) = plain.items()
    if kind == "dict":
        return {key: _restore(part) for key, part in parts.items()}
    return (list if kind == "list" else tuple)(_restore(part) for part in parts)


def _checksum(body: Mapping[str, Any]) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}"


def _key(indices: np.ndarray, mask: np.ndarray | None) -> bytes:
    indices = np.asarray(indices, np.int64)
    return indices.tobytes() + (np.ones(len(indices), bool) if mask is None else np.asarray(mask, bool)).tobytes()


def _cause(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
