"""Hospitals as stacked arrays: `(hospital, record, ...)`, padded to the largest, counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np


class HospitalSource(Protocol):
    """Records of hospitals wherever they lie: `Hospitals` in memory, `StoredHospitals` in TensorStore."""

    @property
    def names(self) -> Sequence[str]:
        """Hospital names, in order."""
        ...

    @property
    def counts(self) -> np.ndarray:
        """`(hospitals,)` int32, how many records each hospital really has."""
        ...

    @property
    def capacity(self) -> int:
        """Records a hospital can hold: the size of the padded record axis."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray, mask: np.ndarray | None = None) -> Any:
        """Records of a cohort: pytree of host arrays `(slots, records, ...)`, zeros where `mask` is False."""
        ...

    def prefetch(self, indices: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Says what the next `take` will be, so that it can be on its way."""
        ...


@dataclass(frozen=True)
class Hospitals:
    """The records of every hospital, stacked and padded.

    Attributes:
        names: hospital names, in the order of the leading axis.
        records: pytree of host arrays `(hospitals, records, ...)`; rows beyond a hospital's count are zero.
        counts: `(hospitals,)` int32, how many records each hospital really has.
    """

    names: tuple[str, ...]
    records: Any
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def capacity(self) -> int:
        """Records a hospital can hold: the size of the padded record axis."""
        return jax.tree.leaves(self.records)[0].shape[1]

    def take(self, indices: np.ndarray, mask: np.ndarray | None = None) -> Any:
        """Returns the records of a cohort: a pytree of host arrays `(slots, records, ...)`.

        Args:
            indices: `(slots,)` positions of the hospitals.
            mask: `(slots,)` bool; slots where it is False hold zeros. All are filled by default.
        """

        def rows(leaf: np.ndarray) -> np.ndarray:
            found = leaf[indices]
            if mask is not None:
                found[~mask] = 0
            return found

        return jax.tree.map(rows, self.records)

    def prefetch(self, indices: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Does nothing: all records are at hand."""


def stack_hospitals(records: Mapping[str, Any]) -> Hospitals:
    """Stacks one pytree of arrays `(records, ...)` per hospital into padded arrays.

    Args:
        records: for every hospital name a pytree of arrays whose leading axis counts its records.

    Raises:
        ValueError: no hospital, a hospital without records, leaves of one hospital that disagree on the
            number of records, or hospitals whose records differ in structure or shape.
    """
    if not records:
        raise ValueError("records: no hospital given; expected a mapping of hospital name to arrays")
    counts: list[int] = []
    first_name = next(iter(records))
    structure = jax.tree.structure(records[first_name])
    shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(records[first_name])]
    for name, tree in records.items():
        leaves = jax.tree.leaves(tree)
        sizes = {leaf.shape[0] for leaf in leaves}
        if len(sizes) != 1:
            raise ValueError(f"records[{name!r}]: arrays disagree on the number of records: {sorted(sizes)}")
        if 0 in sizes:
            raise ValueError(f"records[{name!r}]: no records; leave the hospital out or give it data")
        if jax.tree.structure(tree) != structure or [leaf.shape[1:] for leaf in leaves] != shapes:
            raise ValueError(
                f"records[{name!r}]: record shapes {[leaf.shape[1:] for leaf in leaves]} differ from "
                f"those of {first_name!r}, {shapes}"
            )
        counts.append(sizes.pop())
    capacity = max(counts)

    def pad(leaf: np.ndarray) -> np.ndarray:
        leaf = np.asarray(leaf)
        return np.pad(leaf, [(0, capacity - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1))

    stacked = jax.tree.map(lambda *leaves: np.stack([pad(leaf) for leaf in leaves]), *records.values())
    return Hospitals(tuple(records), stacked, np.asarray(counts, np.int32))


def pool_hospitals(hospitals: Hospitals, name: str = "pooled") -> Hospitals:
    """Returns one hospital that holds the records of all: the centralised comparison."""
    keep = np.arange(hospitals.capacity)[None, :] < hospitals.counts[:, None]
    return stack_hospitals({name: jax.tree.map(lambda leaf: leaf[keep], hospitals.records)})


def seat_hospitals(hospitals: Hospitals, names: Sequence[str]) -> Hospitals:
    """Returns a hospital for every name, in that order; those that are not there hold no records and train nothing."""
    empty = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape[1:]), leaf.dtype), hospitals.records)
    rows = [hospitals.names.index(name) if name in hospitals.names else len(hospitals) for name in names]
    records = jax.tree.map(lambda leaf, none: np.concatenate([leaf, none])[rows], hospitals.records, empty)
    return Hospitals(tuple(names), records, np.append(hospitals.counts, 0).astype(np.int32)[rows])


def select_hospitals(hospitals: Hospitals, names: Sequence[str]) -> Hospitals:
    """Returns the named hospitals, still padded to the largest of all, so that any choice compiles once."""
    rows = [hospitals.names.index(name) for name in names]
    return Hospitals(tuple(names), jax.tree.map(lambda leaf: leaf[rows], hospitals.records), hospitals.counts[rows])
