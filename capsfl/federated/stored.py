"""Hospitals larger than memory: read from a store one cohort at a time, the next one ahead."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import tensorstore

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
    read_value,
    restore_structure,
)


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

    In memory are the names, the counts and at most one cohort read ahead, beside the one that was taken. Stands where
    `Hospitals` does.

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
                    f"{self._where}: hospital {self.names[index]!r} cannot be read ({cause_of(error)}); "
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


def open_hospitals_store(path: Place) -> StoredHospitals:
    """Opens a store; no record is read.

    Raises:
        HospitalStoreError: there is no finished store, or what it says of itself is damaged or does not fit its arrays.
    """
    base, where, context = connect(path)
    text = read_value(base, RECORD, where)
    if text is None:
        started = read_value(base, UNFINISHED, where) is not None
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
    if checksum != checksum_of(body):
        raise HospitalStoreError(f"{where}: {RECORD} does not match its checksum; write the store again")
    names, counts = tuple(body["names"]), np.asarray(body["counts"], np.int32)
    opened = [_open(base / f"leaves/{i}/", context) for i in range(len(body["leaves"]))]
    arrays = []
    for i, (future, leaf) in enumerate(zip(opened, body["leaves"], strict=True)):
        try:
            array = future.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise HospitalStoreError(f"{where}leaves/{i}: unreadable ({cause_of(error)}); write it again") from error
        expected = (len(names), *leaf["shape"])
        if array.shape != expected or array.dtype.name != leaf["dtype"]:
            found, wanted = f"{array.dtype.name} {array.shape}", f"{leaf['dtype']} {expected}"
            raise HospitalStoreError(f"{where}leaves/{i}: {found}, expected {wanted}; write it again")
        arrays.append(array)
    structure = jax.tree.structure(restore_structure(body["structure"]))
    return StoredHospitals(where, names, counts, body["capacity"], structure, arrays)


def _open(base: Any, context: Any) -> Any:
    spec = {"driver": "zarr3", "kvstore": base.spec().to_json(), "fill_missing_data_reads": False}
    return tensorstore.open(spec, open=True, read=True, context=context)


def _key(indices: np.ndarray, mask: np.ndarray | None) -> bytes:
    indices = np.asarray(indices, np.int64)
    return indices.tobytes() + (np.ones(len(indices), bool) if mask is None else np.asarray(mask, bool)).tobytes()
