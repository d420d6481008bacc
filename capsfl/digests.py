"""Digests of what a run holds: tensors by name, type, shape and values, and files by their bytes."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capsfl.ledger.records import parameters_root, tensor_leaf


def tensor_leaves(parameters: Any) -> dict[str, str]:
    """Digests every array: `{path: hex}`, over path, dtype, shape and little-endian C-order bytes."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        array = np.ascontiguousarray(np.asarray(leaf)).reshape(np.shape(leaf))
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        name = path_name(path)
        # Viewed as bytes, which are hashed without a copy: a `memoryview` knows no bfloat16.
        data = array.reshape(-1).view(np.uint8).data
        leaves[name] = tensor_leaf(name, array.dtype.name, array.shape, data).hex()
    return leaves


def update_digest(update: Any) -> str:
    """Returns the digest of a hospital's update in hex, the root over its tensors' leaves."""
    return parameters_root(tensor_leaves(update))


def file_digests(folder: Path) -> dict[str, str]:
    """Digests every file under a folder: `{relative path: SHA-256 in hex}`."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree path as words joined by dots; Flax's `.value` wrapper is not part of the name."""
    words = []
    for entry in path:
        word = next(str(getattr(entry, field)) for field in ("key", "name", "idx") if hasattr(entry, field))
        if word != "value":
            words.append(word)
    return ".".join(words)
