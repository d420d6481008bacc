"""The format of a store of hospitals: a record of itself, and per leaf a Zarr3 array with one chunk a hospital."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorstore

FORMAT = "capsfl-hospitals"
VERSION = 1
RECORD = "hospitals.json"
UNFINISHED = "unfinished"
CACHE_BYTES = 16 << 20

Place = Path | str | Mapping[str, Any]
"""A folder, a TensorStore URL (`gs://bucket/hospitals/`), or the JSON of a key-value store."""


class HospitalStoreError(ValueError):
    """A store of hospitals that cannot be written, opened or read."""


def connect(path: Place) -> tuple[Any, str, Any]:
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
        raise HospitalStoreError(f"{where}: not a place for a store ({cause_of(error)})") from error
    store = store if not store.path or store.path.endswith("/") else store / "/"
    return store, where.rstrip("/") + "/", context


def read_value(base: Any, key: str, where: str) -> bytes | None:
    """The bytes under a key; None where there are none."""
    try:
        result = base.read(key).result()
    except (ValueError, OSError, RuntimeError) as error:
        raise HospitalStoreError(f"{where}{key}: cannot be read ({cause_of(error)})") from error
    return bytes(result.value) if result.state == "value" else None


def describe_structure(name: str, tree: Any) -> Any:
    """A tree of leaf numbers as JSON: lists and tuples are told apart, since jax does."""
    if isinstance(tree, int) or tree is None:
        return tree
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [describe_structure(name, part) for part in tree]}
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: describe_structure(name, part) for key, part in tree.items()}}
    raise ValueError(
        f"hospitals[{name!r}]: holds a {type(tree).__name__}; only dicts with names, lists and tuples store"
    )


def restore_structure(plain: Any) -> Any:
    """The tree that `describe_structure` wrote down."""
    if not isinstance(plain, dict):
        return plain
    ((kind, parts),) = plain.items()
    if kind == "dict":
        return {key: restore_structure(part) for key, part in parts.items()}
    return (list if kind == "list" else tuple)(restore_structure(part) for part in parts)


def checksum_of(body: Mapping[str, Any]) -> str:
    """What a store's record must hash to."""
    return f"sha256:{hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}"


def cause_of(error: Exception) -> str:
    """What went wrong, in one line."""
    return str(error).splitlines()[0][:200]
