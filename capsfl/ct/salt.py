"""The secret of a folder of volumes, from which pseudonyms are made; gone again where nothing was made with it."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from capsfl.ct.output import below, create_object, read_file, remove_file, storage_errors
from capsfl.ct.zarr_group import Place, open_store
from capsfl.workers import process_tag

SALT = ".pseudonym-salt"


@contextmanager
def salted(out: Place) -> Iterator[bytes]:
    """Opens a place for volumes, makes it where it is absent, and gives its secret.

    A command that is refused leaves nothing: where the body fails and no volume stands beside a secret that was made
    here, it goes, and so do the folders that were made for it. Another process may have read it by then, so whoever
    ends well puts back the secret that it used.

    Args:
        out: a folder, or the URL of an object store, as `parse_place` gives it.

    Raises:
        StorageError: it is read-only or full.
    """
    made: list[Path] = []
    found = None
    try:
        with storage_errors(out):
            if isinstance(out, Path):
                made = [folder for folder in (out, *out.parents) if not folder.exists()]
                out.mkdir(parents=True, exist_ok=True)
            found = read_file(below(out, SALT))
            salt = found if found is not None else _create(out, secrets.token_bytes(32))
        yield salt
    except BaseException:
        if found is None:
            with suppress(OSError, ValueError, RuntimeError):  # what failed first is what has to be said
                _withdraw(out, made)
        raise
    with storage_errors(out):
        _create(out, salt)


def _create(out: Place, salt: bytes) -> bytes:
    """Writes the secret unless there is one, and returns the one that counts; readable by its owner only.

    In an object store whoever may read the volumes may read it.
    """
    if not isinstance(out, Path):
        return create_object(str(below(out, SALT)), salt)
    path = out / SALT
    if not path.exists():
        draft = out / f"{SALT}.{process_tag()}.partial"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(salt)
            with suppress(FileExistsError):  # another process was faster, and its salt counts
                os.link(draft, path)
        finally:
            draft.unlink()
    return path.read_bytes()


def _withdraw(out: Place, made: list[Path]) -> None:
    """Removes the secret unless something was stored or is being stored with it, and then the folders made for it."""
    if not isinstance(out, Path):
        if not any(b".zarr/" in key for key in open_store(out).list().result()):
            remove_file(below(out, SALT))
        return
    if any(path for pattern in ("*/*.zarr", "*/.*.partial", f"{SALT}.*") for path in out.glob(pattern)):
        return
    (out / SALT).unlink(missing_ok=True)
    if out in made:
        for folder in (*sorted(out.rglob("*"), reverse=True), *made):
            with suppress(OSError):
                folder.rmdir()
