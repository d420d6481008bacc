"""Bytes on a disk that may fill up, fail or lose power: a framed log, an atomic head, a lock.

A frame is the length of its payload and a CRC-32 of length and payload (4 bytes each, big-endian), then the
payload. The CRC tells a torn write from a whole one: it protects against accidents, signatures from people.
Only names that are regular files are opened, without following links or waiting on a FIFO.
"""

import errno
import fcntl
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from capsfl.ledger.canonical import MAX_BYTES
from capsfl.ledger.errors import LockedError, StorageError

_HEADER_BYTES = 8
_NO_SURPRISES = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class TornFrame(Exception):
    """The bytes from here on are not a whole frame."""


def frame(payload: bytes) -> bytes:
    """Returns the frame around a payload."""
    length = len(payload).to_bytes(4, "big")
    return length + zlib.crc32(length + payload).to_bytes(4, "big") + payload


def read_frame(stream: BinaryIO) -> bytes | None:
    """Returns the next payload, or None at the end; never reads more than a block may have.

    Raises:
        TornFrame: the frame is cut short, longer than any frame we write, or fails its checksum.
    """
    header = stream.read(_HEADER_BYTES)
    if not header:
        return None
    if len(header) < _HEADER_BYTES:
        raise TornFrame("it is cut short")
    length, checksum = header[:4], int.from_bytes(header[4:], "big")
    size = int.from_bytes(length, "big")
    if not 0 < size <= MAX_BYTES:
        raise TornFrame(f"it claims a length of {size} bytes")
    payload = stream.read(size)
    if len(payload) < size:
        raise TornFrame("it is cut short")
    if zlib.crc32(length + payload) != checksum:
        raise TornFrame("its checksum does not match")
    return payload


@contextmanager
def surfaced(path: Path) -> Iterator[None]:
    """Turns any OSError within into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free space, then run the same command again" if full else ""
        raise StorageError(f"{path}: {error.strerror or error}{remedy}") from error


@contextmanager
def open_regular(path: Path, flags: int) -> Iterator[int]:
    """Opens a regular file and yields its descriptor.

    Raises:
        StorageError: the file is missing, a link, a FIFO or a device, or the file system refuses.
    """
    with surfaced(path):
        descriptor = os.open(path, flags | _NO_SURPRISES, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StorageError(f"{path}: not a regular file")
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading; see `open_regular`."""
    with open_regular(path, os.O_RDONLY) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
        yield stream


def read_whole(path: Path, limit: int) -> bytes:
    """Returns the bytes of a regular file of at most `limit` bytes.

    Raises:
        StorageError: the file is larger, missing, or not a regular file.
    """
    with open_stream(path) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise StorageError(f"{path}: larger than {limit} bytes")
    return data


def write_from(path: Path, offset: int, data: bytes) -> None:
    """Makes the file hold its first `offset` bytes, then `data`, then nothing; on disk when it returns."""
    with open_regular(path, os.O_WRONLY | os.O_CREAT) as descriptor:
        os.ftruncate(descriptor, offset)
        os.lseek(descriptor, offset, os.SEEK_SET)
        _write_all(descriptor, data)
        os.fsync(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Replaces a file by another, whole or not at all; on disk when it returns."""
    draft = path.with_name(f"{path.name}.new")
    with surfaced(draft), suppress(FileNotFoundError):
        os.unlink(draft)  # left by a crash, or a link put there
    try:
        with open_regular(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        with surfaced(path):
            os.replace(draft, path)
    except StorageError:
        with suppress(OSError):
            os.unlink(draft)  # half of a file is nobody's, and on a full disk it is in the way
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Puts a folder's names on disk."""
    with surfaced(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the only writer's lock.

    Raises:
        LockedError: another writer, in this process or another, holds it.
    """
    with open_regular(path, os.O_RDWR | os.O_CREAT) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(f"{path}: another writer holds this ledger: wait for it to end") from None
        yield


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]  # a full disk or a signal may cut a write short
