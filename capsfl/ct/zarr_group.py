"""Groups of arrays as Zarr 3, on a disk or in an object store: checksummed, written whole or not at all."""

import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
import tensorstore

from capsfl.ct.errors import CorruptVolume, StorageError
from capsfl.workers import count_threads, process_tag

Place: TypeAlias = Path | str
"""A folder, or the URL of one: `file://`, `s3://`, `gs://` or `memory://` (this process only)."""

Read = TypeVar("Read")
Digest: TypeAlias = Callable[[Mapping[str, np.ndarray]], str]
OBJECT_STORES = ("gs", "memory", "s3")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
"""Stores of hospitals' own have no regions; their requests are signed for one all the same."""
RECORD = "capsfl"
"""Name of our own attributes in the group's `zarr.json`."""
MARKER = "zarr.json"
KEY = MARKER.encode()
PREFIX = "prefix"
"""Entry of an object store's marker: below which prefix the arrays lie."""
INNER_CHUNK, MASK_CHUNK = 32, 64
"""Side of a compressed block; an array is one shard, one file, of such blocks. A plane of a 512 volume costs 7 to 10 ms
of processor time in every direction, 11 to 16 with blocks of 64 and 23 to 30 with blocks of 128, the whole volume 5 %
more than with either; blocks of 16 save nothing more and write half as fast. Of arrays of bytes, which are masks and
shrink a hundredfold, a block costs more than what is in it: larger ones write a third faster."""


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array and how it is stored."""

    values: np.ndarray
    dimensions: tuple[str, ...]
    """Name of each axis."""
    fill_value: int | bool = 0
    """Of the array in Zarr's sense; blocks full of it are stored like others."""


def parse_place(place: Place) -> Path | str:
    """Tell a folder (as a Path; `file://` URLs too) from an object store (as a URL without a final slash).

    Raises:
        ValueError: a URL of another kind.
    """
    if isinstance(place, Path) or "://" not in place:
        return Path(place)
    parts = urlsplit(place)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return Path(unquote(parts.path))
    if parts.scheme not in OBJECT_STORES or not (parts.netloc or parts.path):
        known = ", ".join(f"{name}://" for name in ("file", *OBJECT_STORES))
        raise ValueError(f"{place}: no place for volumes; give a folder, or a URL that begins with {known}")
    return place.rstrip("/")


def write_group(
    place: Place,
    arrays: Mapping[str, StoredArray],
    *,
    record: Mapping[str, Any],
    also_checked: Mapping[str, np.ndarray] | None = None,
    digest: Digest | None = None,
) -> str:
    """Write arrays as a Zarr 3 group, in place of what stood there, and return their checksum.

    In a folder the group is written beside its place and renamed: a reader sees the old one, the new one or none.
    Object stores have no renaming: there the arrays go below a fresh prefix, a group of its own that any Zarr reader
    opens, and last the place's `zarr.json` is written, one object, which names the prefix. A reader sees the old group
    or the new one, and a writer that fails or is killed leaves the old one. Of two writers at one time the first to
    end wins, the other is refused; whoever wins removes what lay there before it did, killed writers' leavings too.
    (TensorStore asks an S3 store just before it writes the marker, and not with it. Two who end within the milliseconds
    in between may both seem to win, and leave a volume that reads as damaged.)

    Args:
        place: where to; missing parents are created.
        arrays: by name; `a/b` lies in the subgroup `a`.
        record: JSON values kept with it; `checksum` is added.
        also_checked: what the record holds as text and the checksum covers as arrays.
        digest: of all arrays by name; `checksum` when None.

    Raises:
        StorageError: the place is read-only or full, or another process wrote it meanwhile; what stood there stays.
    """
    place, also = parse_place(place), also_checked or {}

    def total() -> str:
        return (digest or checksum)({**{name: array.values for name, array in arrays.items()}, **also})

    try:
        if isinstance(place, Path):
            return _write_folder(place, arrays, record, total)
        return _write_below_prefix(place, arrays, record, total)
    except StorageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore reports a full disk as ValueError
        remedy = "free space or choose a writable folder" if isinstance(place, Path) else "check the store's access"
        raise StorageError(f"{place}: cannot be written ({cause_of(error)}); {remedy}") from error


def read_record(place: Place, *, format: str, versions: tuple[int, ...]) -> dict[str, Any]:
    """Read what `write_group` kept with the arrays, without them.

    Args:
        place: the group.
        format: what `record["format"]` must be.
        versions: what `record["version"]` may be; the last one is current.

    Raises:
        CorruptVolume: absent, incomplete, or of another format or version.
    """
    place = parse_place(place)
    try:
        content = (place / MARKER).read_bytes() if isinstance(place, Path) else open_store(place)[MARKER]
        record = json.loads(content)["attributes"][RECORD]
        found = record["format"], record["version"]
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CorruptVolume(place, "not a stored volume", "ingest the scan again") from error
    if found[0] != format or found[1] not in versions:
        fault = f"format {found[0]} {found[1]}, not {format} {versions[-1]}"
        raise CorruptVolume(place, fault, "ingest the scan again")
    return record


def read_group(
    place: Place, names: Callable[[Mapping[str, Any]], Iterable[str]], *, format: str, versions: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the record and arrays of one writing whole; `checksum` tells whether they are what was written.

    Args:
        place: the group.
        names: of the arrays that a record asks for.
        format: as for `read_record`.
        versions: as for `read_record`.

    Raises:
        CorruptVolume: absent, of another format or version, or an array is absent or damaged.
    """

    def read(record: dict[str, Any], root: tensorstore.KvStore) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        wanted = list(names(record))
        opened = [_open(root, name) for name in wanted]
        reads = [handle.result().read() for handle in opened]
        return record, {name: np.asarray(read.result()) for name, read in zip(wanted, reads, strict=True)}

    return _read_steadily(place, read, format=format, versions=versions)


def read_region(
    place: Place,
    name: str,
    region: tuple[slice, ...],
    *,
    format: str,
    versions: tuple[int, ...],
    complete_since: int,
) -> np.ndarray:
    """Read a part of one array; only the blocks that it touches are read, each against its own CRC-32C.

    Args:
        place: the group.
        name: of the array.
        region: a slice along each axis.
        format: as for `read_record`.
        versions: as for `read_record`.
        complete_since: version from which on every block is stored, so that a missing one is lost.

    Raises:
        CorruptVolume: as for `read_group`; a block is damaged or missing.
        ValueError: the region leaves the array.
    """

    def read(record: dict[str, Any], root: tensorstore.KvStore) -> np.ndarray:
        array = _open(root, name, complete=record["version"] >= complete_since).result()
        for axis, (part, size) in enumerate(zip(region, array.shape, strict=True)):
            if not 0 <= (part.start or 0) <= (size if part.stop is None else part.stop) <= size:
                raise IndexError(f"region: {part.start}:{part.stop} along axis {axis} of {size}; stay inside the array")
        return np.asarray(array[region].read().result())

    try:
        return _read_steadily(place, read, format=format, versions=versions)
    except IndexError as error:
        raise ValueError(str(error)) from None


def _read_steadily(
    place: Place, read: Callable[[dict[str, Any], tensorstore.KvStore], Read], *, format: str, versions: tuple[int, ...]
) -> Read:
    """Read by one record; where the group was replaced meanwhile, its arrays are gone, and the new one is read."""
    place = parse_place(place)
    record = read_record(place, format=format, versions=versions)
    while True:
        found, fault = None, None
        try:
            store = open_store(place)
            found = read(record, store + f"{record[PREFIX]}/" if PREFIX in record else store)
        except (OSError, ValueError, RuntimeError) as error:
            fault = error
        # Below a prefix nothing is written twice; elsewhere half of what was read may be older than the other half.
        if fault is not None or PREFIX not in record:
            now = read_record(place, format=format, versions=versions)
            if now != record:
                record = now
                continue
        if fault is not None:
            remedy = "delete it and ingest the scan again"
            raise CorruptVolume(place, f"unreadable ({cause_of(fault)})", remedy) from fault
        assert found is not None
        return found


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and little-endian bytes; it does not depend on blocks or compression."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        digest.update(f"{name} {little.dtype.str} {little.shape}\n".encode())
        digest.update(little.data)
    return f"sha256:{digest.hexdigest()}"


def brief_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """As `checksum`, over fewer bytes that say the same, for volumes that are half air.

    Of arrays of integers or bool, the planes at either end of the first axis that hold one value count as that value
    and their number; where all the rest is 0 or 1, eight values count as a byte (`np.packbits`).
    """
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        digest.update(f"{name} {little.dtype.str} {little.shape}\n".encode())
        if little.dtype.kind in "biu" and little.ndim and little.size:
            planes = little.reshape(len(little), -1)
            first, last = planes[0, 0], planes[-1, -1]
            start, stop = 0, len(planes)
            while start < stop and (planes[start] == first).all():
                start += 1
            while start < stop and (planes[stop - 1] == last).all():
                stop -= 1
            little = planes[start:stop]
            binary = little.dtype.kind == "b" or (little.dtype == np.uint8 and bool(little.max(initial=0) <= 1))
            digest.update(f"{start} x {int(first)}, {len(planes) - stop} x {int(last)}, {'bits' * binary}\n".encode())
            little = np.packbits(little) if binary else little.ravel()
        digest.update(little.data)
    return f"sha256:{digest.hexdigest()}"


def cause_of(error: Exception) -> str:
    """What went wrong in a few words; TensorStore's own text is longer than a line, paths included."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if str(error).startswith("RESOURCE_EXHAUSTED"):
        return os.strerror(errno.ENOSPC)
    return str(error).splitlines()[0][:160]


def _write_folder(
    place: Path, arrays: Mapping[str, StoredArray], record: Mapping[str, Any], total: Callable[[], str]
) -> str:
    partial = place.with_name(f".{place.name}.{process_tag()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        found = _write_objects(open_store(partial), arrays, record, total)
        _replace(partial, place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return found


def _write_below_prefix(
    place: str, arrays: Mapping[str, StoredArray], record: Mapping[str, Any], total: Callable[[], str]
) -> str:
    """Write below a fresh prefix of an object store, then let the marker point there."""
    root, prefix = open_store(place), secrets.token_hex(8)
    before = root.read(MARKER).result().stamp.generation
    try:
        found = _write_objects(root + f"{prefix}/", arrays, record, total)
        # Whoever wrote one of these began before the marker moves, and will not move it.
        old = [key for key in root.list().result() if not key.startswith(f"{prefix}/".encode()) and key != KEY]
        marker = _group({RECORD: {**record, "checksum": found, PREFIX: prefix}})
        if not root.write(MARKER, marker, if_equal=before).result().generation:
            raise StorageError(f"{place}: another process wrote it meanwhile; run the same command again")
    except BaseException:
        with suppress(OSError, ValueError, RuntimeError):
            # A store may have moved the marker and failed to say so.
            if prefix.encode() not in root.read(MARKER).result().value:
                _clear(root + f"{prefix}/")
        raise
    with suppress(OSError, ValueError, RuntimeError):  # the new group stands; the next writer removes what is left
        for removal in [root.write(key, None) for key in old]:
            removal.result()
    return found


def _write_objects(
    root: tensorstore.KvStore,
    arrays: Mapping[str, StoredArray],
    record: Mapping[str, Any],
    total: Callable[[], str],
) -> str:
    """Write what is no group before its last object, the marker, stands."""
    _clear(root)
    writes: list[tensorstore.Future[None]] = []
    try:
        for name, array in arrays.items():
            writes.append(_write_array(root, name, array))
        # Meanwhile other threads compress.
        found = total()
        for write in writes:
            write.result()
    finally:
        for write in writes:  # what was begun must have ended before anybody clears up
            write.exception()
    for group in sorted({name.rpartition("/")[0] for name in arrays} - {""}):
        root.write(f"{group}/{MARKER}", _group({})).result()
    root.write(MARKER, _group({RECORD: {**record, "checksum": found}})).result()
    return found


def _clear(root: tensorstore.KvStore) -> None:
    root.write(MARKER, None).result()
    root.delete_range(tensorstore.KvStore.KeyRange()).result()


def _group(attributes: dict[str, Any]) -> bytes:
    record = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(record, indent=1, allow_nan=False).encode()


def _write_array(root: tensorstore.KvStore, name: str, array: StoredArray) -> tensorstore.Future[None]:
    values = array.values
    inner = [min(MASK_CHUNK if values.dtype.itemsize == 1 else INNER_CHUNK, size) for size in values.shape]
    shard = [-(-size // side) * side for size, side in zip(values.shape, inner, strict=True)]
    # On CT, zstd saves a sixth of the bytes for three to six times the processor time, and reads half as fast.
    bits = "bitshuffle" if values.dtype.itemsize == 1 else "shuffle"
    compression = {"cname": "lz4", "clevel": 5, "shuffle": bits, "typesize": values.dtype.itemsize}
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": inner,
        "codecs": [checked[0], {"name": "blosc", "configuration": compression}, checked[1]],
        "index_codecs": checked,
        "index_location": "end",
    }
    metadata = {
        "shape": list(values.shape),
        "data_type": values.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": list(array.dimensions),
        "fill_value": array.fill_value,
    }
    # A block of nothing but air is stored too: what is missing has been lost.
    spec = {"driver": "zarr3", "metadata": metadata, "store_data_equal_to_fill_value": True}
    store = tensorstore.open(spec, kvstore=root + f"{name}/", context=_context(), create=True).result()
    return store.write(values, can_reference_source_data_indefinitely=True).commit


def _open(
    root: tensorstore.KvStore, name: str, *, complete: bool = False
) -> tensorstore.Future[tensorstore.TensorStore]:
    spec = {"driver": "zarr3", "fill_missing_data_reads": not complete}
    return tensorstore.open(spec, kvstore=root + f"{name}/", context=_context(), read=True)


def open_store(place: Path | str) -> tensorstore.KvStore:
    """The keys and values below a place, as `parse_place` gives it.

    `s3://` is Amazon's service, or the one that `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` names, as for Amazon's own
    tools: TensorStore takes the address in a specification alone.
    """
    if isinstance(place, Path):
        spec: Any = {"driver": "file", "path": f"{place}/"}
    else:
        spec = tensorstore.KvStore.Spec(f"{place}/").to_json()
        if spec["driver"] == "s3":
            spec |= _s3_access()
    return tensorstore.KvStore.open(spec, context=_context()).result()


def _s3_access() -> dict[str, Any]:
    """Whose S3 it is and who asks, as far as the environment says so."""
    access: dict[str, Any] = {}
    if endpoint := next(filter(None, map(os.environ.get, ENDPOINTS)), None):
        region = next(filter(None, map(os.environ.get, REGIONS)), "us-east-1")
        access |= {"endpoint": endpoint.rstrip("/"), "aws_region": region}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # no need to look for profiles and to ask the machine's own service
        access["aws_credentials"] = {"type": "environment"}
    return access


@functools.cache
def _context() -> tensorstore.Context:
    """One for the process: `memory://` lives in it, and blocks are compressed by as many threads as are ours."""
    return tensorstore.Context({"data_copy_concurrency": {"limit": count_threads()}})


def _replace(partial: Path, path: Path) -> None:
    """Rename a folder over another; a crash in between leaves the old one under a hidden name, never half."""
    if not path.exists():
        os.rename(partial, path)
        return
    old = path.with_name(f".{path.name}.{process_tag()}.old")
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        with suppress(OSError):
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
