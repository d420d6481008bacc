"""The small files beside volumes, in a folder or an object store: written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorstore

from capsfl.ct.errors import StorageError
from capsfl.ct.zarr_group import Place, cause_of, open_store, parse_place
from capsfl.workers import process_tag


def below(out: Place, *parts: str) -> Place:
    """A place within a folder or an object store."""
    out = parse_place(out)
    return out.joinpath(*parts) if isinstance(out, Path) else "/".join((out, *parts))


def read_file(place: Place) -> bytes | None:
    """The content of a file or an object; None where there is none.

    Raises:
        StorageError: it is there and cannot be read.
    """
    place = parse_place(place)
    try:
        if isinstance(place, Path):
            return place.read_bytes() if place.exists() else None
        store, key = _object(place)
        found = store.read(key).result()
        return found.value if found.state == "value" else None
    except (OSError, ValueError, RuntimeError) as error:
        raise StorageError(f"{place}: cannot be read ({cause_of(error)}); check its permissions") from error


def write_file(place: Place, content: bytes) -> None:
    """Write a file beside its place and rename it, or write an object, which is one step.

    Raises:
        StorageError: the place is read-only or full; what stood there stays.
    """
    place = parse_place(place)
    with storage_errors(place):
        if not isinstance(place, Path):
            store, key = _object(place)
            store.write(key, content).result()
            return
        partial = place.with_name(f".{place.name}.{process_tag()}.partial")
        try:
            partial.write_bytes(content)
            os.replace(partial, place)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def create_object(place: str, content: bytes) -> bytes:
    """Write an object unless there is one, and return what then stands there: of several processes all see one.

    Raises:
        StorageError: it can be neither written nor read.
    """
    with storage_errors(place):
        store, key = _object(place)
        found = store.read(key).result()
        if found.state != "value":
            store.write(key, content, if_equal=found.stamp.generation).result()
            found = store.read(key).result()
        return found.value


def remove_file(place: Place) -> None:
    """Remove a file or an object, if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    place = parse_place(place)
    with storage_errors(place):
        if isinstance(place, Path):
            place.unlink(missing_ok=True)
        else:
            store, key = _object(place)
            store.write(key, None).result()


@contextmanager
def storage_errors(place: Place) -> Iterator[None]:
    """Say in one line which place cannot be written, and why.

    Raises:
        StorageError: instead of an error of the disk or of the store.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore reports both of the latter
        remedy = "free space or choose a writable folder" if isinstance(place, Path) else "check the store's access"
        raise StorageError(f"{place}: cannot be written ({cause_of(error)}); {remedy}") from error


def _object(place: str) -> tuple[tensorstore.KvStore, str]:
    parent, _, key = place.rpartition("/")
    return open_store(parent), key
