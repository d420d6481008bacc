"""Block sizes that were measured to be fast: a small built-in table, and one of the user's that tuning writes.

An entry says that an operator's implementation ran fastest with this block size, on this kind of device, for
this dtype and shape. `choose` takes the nearest entry, where one is near enough; the user's own entries go
before the built-in ones. The user's table is JSON in ``$XDG_CACHE_HOME/capsfl/block_sizes.json`` (or
``~/.cache``), and the environment variable ``CAPSFL_BLOCK_SIZES`` names another place.
"""

import functools
import json
import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

VERSION = 1
LARGEST = 1 << 24

# A block that suits a shape suits its neighbours; beyond twice or half along any axis, the rule of thumb of
# the operator (its default) knows better.
_NEAR = math.log(2) + 1e-9


class Entry(NamedTuple):
    """One measured choice."""

    operator: str
    implementation: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    block_size: int


# Only what was measured with `capsfl bench routing --tune` and beat the operator's own default.
BUILT_IN: tuple[Entry, ...] = ()


def choose(operator: str, implementation: str, *, shape: tuple[int, ...], dtype: Any, default: int) -> int:
    """The block size to use for one shape.

    Args:
        operator: Name of the operator, such as ``"dynamic_routing"``.
        implementation: Name of the implementation, such as ``"streamed"``.
        shape: Sizes that the choice depends on, in an order that the operator fixes; for `dynamic_routing`
            ``(batch, inputs, depth, capsules, dim)``.
        dtype: Of the inputs.
        default: What to use where no entry is near: the same number of axes, each within a factor of two.

    Returns:
        The block size of the nearest entry for this device, or the default.
    """
    wanted = (operator, implementation, _device_kind(), jnp.dtype(dtype).name)
    for entries in (_read(*_identity(table_path())), BUILT_IN):
        fitting = [entry for entry in entries if entry[:4] == wanted and len(entry.shape) == len(shape)]
        factors = [(_factors(entry.shape, shape), entry.block_size) for entry in fitting]
        near = [(sum(found), block_size) for found, block_size in factors if max(found) <= _NEAR]
        if near:
            return min(near)[1]
    return default


def record(operator: str, implementation: str, *, shape: tuple[int, ...], dtype: Any, block_size: int) -> Path:
    """Adds one measured entry to the user's table, in place of an earlier one for the same shape.

    Args:
        operator: As in `choose`.
        implementation: As in `choose`.
        shape: As in `choose`.
        dtype: As in `choose`.
        block_size: What was fastest on the device at hand.

    Returns:
        The table's path.

    Raises:
        ValueError: the entry makes no sense, or the file there is not such a table; it is left as it is.
        OSError: the folder or the file cannot be written.
    """
    entry = Entry(operator, implementation, _device_kind(), jnp.dtype(dtype).name, tuple(shape), block_size)
    _check(entry._asdict())
    path = table_path()
    if path is None:
        raise ValueError("block sizes: there is no home directory; set CAPSFL_BLOCK_SIZES to a file to write")
    entries: tuple[Entry, ...] = ()
    if path.exists():
        try:
            entries = _parse(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}; move it away, or set CAPSFL_BLOCK_SIZES to another file") from None
    kept = [other for other in entries if other[:5] != entry[:5]]
    rows = [other._asdict() for other in sorted([*kept, entry])]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may read at any moment: it finds the old table or the new one, whole.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"capsfl_block_sizes": VERSION, "entries": rows}, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def table_path() -> Path | None:
    """Where the user's table is or would be; None where the user has no home directory."""
    given = os.environ.get("CAPSFL_BLOCK_SIZES")
    if given:
        return Path(given)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache / "capsfl" / "block_sizes.json"


def _identity(path: Path | None) -> tuple[str, int, int]:
    """Path, time of change and size: as long as they stay, the table in memory is the one on disk."""
    if path is None:
        return "", 0, 0
    try:
        found = path.stat()
    except OSError:
        return "", 0, 0
    return str(path), found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=8)
def _read(path: str, changed_ns: int, size: int) -> tuple[Entry, ...]:
    if not path:
        return ()
    try:
        return _parse(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        warnings.warn(
            f"block sizes: {path} is ignored: {reason}; delete it, and measure anew by `capsfl bench routing --tune`",
            stacklevel=3,
        )
        return ()


def _parse(content: bytes) -> tuple[Entry, ...]:
    """Entries of a table; ValueError says what is wrong with it."""
    try:
        table = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(table, dict) or table.get("capsfl_block_sizes") != VERSION:
        raise ValueError(f"it is no table of block sizes of version {VERSION}")
    rows = table.get("entries")
    if not isinstance(rows, list):
        raise ValueError("its entries are not a list")
    return tuple(_check(row) for row in rows)


def _check(row: Any) -> Entry:
    if not isinstance(row, dict) or row.keys() != set(Entry._fields):
        raise ValueError(f"an entry needs exactly {', '.join(Entry._fields)}; got {str(row)[:100]}")
    for name in Entry._fields[:4]:
        if not isinstance(row[name], str) or not row[name]:
            raise ValueError(f"{name}={row[name]!r} must be a word")
    shape = row["shape"]
    if not isinstance(shape, list | tuple) or not shape or not all(_is_size(axis) for axis in shape):
        raise ValueError(f"shape={shape!r} must be a list of positive integers")
    if not _is_size(row["block_size"]):
        raise ValueError(f"block_size={row['block_size']!r} must be an integer from 1 to {LARGEST}")
    return Entry(**{**row, "shape": tuple(shape)})


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def _factors(one: tuple[int, ...], other: tuple[int, ...]) -> list[float]:
    """The factor between two shapes along each axis, as a logarithm."""
    return [abs(math.log(a / b)) for a, b in zip(one, other, strict=True)]


def _device_kind() -> str:
    return jax.devices()[0].device_kind
