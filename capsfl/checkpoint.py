"""Orbax checkpoints of a task's rounds: weights, server optimizer, accountant and ledger in one atomic step."""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from capsfl.digests import path_name
from capsfl.digests import tensor_leaves as tensor_leaves
from capsfl.federated.round import RoundState
from capsfl.ledger.history import first_difference
from capsfl.ledger.records import RoundRecord, parameters_root


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read back; the message names the folder and the remedy."""


@dataclass(frozen=True)
class Step:
    """What a round leaves on disk.

    Attributes:
        state: weights, server optimizer, round and the rest: dictionaries of arrays by path.
        key: data of the run's root key; every draw of a round is folded from it and the round's number.
        accountant: what the privacy accountant reports at this round.
        ledger: the ledger's log, this round's record included, as an array of bytes.
    """

    state: Mapping[str, Any]
    key: Any
    accountant: Mapping[str, Any]
    ledger: Any

    @classmethod
    def of(cls, state: RoundState, *, key: jax.Array, accountant: Mapping[str, Any], ledger: bytes) -> "Step":
        """Returns the step of a round from the run's root key and the ledger's log."""
        data = np.asarray(jax.random.key_data(key))
        return cls(_plain(state), data, dict(accountant), np.frombuffer(ledger, np.uint8))

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digest of everything in the step, by name, in hex."""
        report = json.dumps(self.accountant, sort_keys=True).encode()
        arrays = tensor_leaves({**self.state, "random": self.key, "ledger": self.ledger})
        return arrays | {"accountant": hashlib.sha256(report).hexdigest()}

    @property
    def digest(self) -> str:
        """One digest of it all, the same whenever the round is run again: the Merkle root over the digests, in hex."""
        return parameters_root(self.digests)


@dataclass(frozen=True)
class Restored:
    """A step read back.

    Attributes:
        state: weights, server optimizer state and round.
        accountant: what the privacy accountant had reported at that round.
        ledger: the ledger's log as it was when the step was saved.
        digest: of everything in the step (`Step.digest`).
    """

    state: RoundState
    accountant: Mapping[str, Any]
    ledger: bytes
    digest: str


class Checkpoints:
    """The rounds of one task under `folder/<round>`.

    Orbax writes a step beside its final name and renames it, so an interrupted save never becomes the latest. A step
    also holds the digests of everything in it: a disk that changes a bit of an optimizer's state, which the ledger does
    not record, is refused by name.

    Args:
        folder: created when missing.
        keep: rounds kept, the newest ones; None keeps all, so that `capsfl verify` can recompute every round.
    """

    def __init__(self, folder: Path, *, keep: int | None = None) -> None:
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointError(f"{folder}: {error.strerror or error}; choose a writable `out`") from error

    def save(self, step: Step) -> None:
        """Saves one round atomically, or raises CheckpointError and leaves the previous rounds as they were."""
        number = int(step.state["round"])
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(step.state),
            random=ocp.args.StandardSave({"key": step.key}),
            accountant=ocp.args.JsonSave(step.accountant),
            ledger=ocp.args.StandardSave({"log": step.ledger}),
            digests=ocp.args.JsonSave(step.digests),
        )
        try:
            with _quiet_orbax():
                self._manager.save(number, args=items)
                self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / str(number)}: checkpoint not written: {_cause(error)}; "
                "free space or choose another `out`, then run again to resume"
            ) from error

    def rounds(self) -> list[int]:
        """Rounds that are completely on disk."""
        return sorted(self._manager.all_steps())

    def restore(self, like: RoundState, *, key: jax.Array, round_number: int | None = None) -> Restored | None:
        """Reads a round back into the shapes of `like`; the latest by default, None when there is none.

        Raises:
            CheckpointError: the round cannot be read, is not what was saved, or was drawn from another root key.
        """
        step = self._manager.latest_step() if round_number is None else round_number
        if step is None:
            return None
        try:
            with _quiet_orbax():
                items: Any = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(_plain(like)),
                        random=ocp.args.StandardRestore(),
                        accountant=ocp.args.JsonRestore(),
                        ledger=ocp.args.StandardRestore(),
                        digests=ocp.args.JsonRestore(),
                    ),
                )
        except Exception as error:  # whatever Orbax trips over in a damaged file, an AttributeError too
            if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
                raise  # another process is lost
            other = _difference(self.folder / str(step), like)
            if other is not None:
                raise CheckpointError(
                    f"{self.folder / str(step)}: made by another configuration: {other}; resume with that one, or "
                    "choose another `out`"
                ) from error
            raise CheckpointError(
                f"{self.folder / str(step)}: checkpoint unreadable: {_cause(error)}; delete this folder to "
                "resume from the round before it"
            ) from error
        found = Step(items.state, items.random["key"], items.accountant, items.ledger["log"])
        changed = first_difference(items.digests, found.digests)
        if changed is not None:
            raise CheckpointError(
                f"{self.folder / str(step)}: {changed} is not what was saved; delete this folder to resume from the "
                "round before it"
            )
        if not np.array_equal(items.random["key"], jax.random.key_data(key)):
            raise CheckpointError(
                f"{self.folder / str(step)}: drawn from another seed, or for other numbers of patients; resume with "
                "those it was made by"
            )
        state = RoundState(
            _like(like.parameters, items.state["parameters"]),
            _like(like.server, items.state.get("server") or {}),
            _placed(items.state["round"]),
            None if like.controls is None else _like(like.controls, items.state["controls"]),
            None if like.clip_norm is None else _placed(items.state["clip_norm"]),
            None if like.noise is None else _like(like.noise, items.state["noise"]),
            None if like.statistics is None else _like(like.statistics, items.state["statistics"]),
        )
        return Restored(state, found.accountant, np.asarray(found.ledger, np.uint8).tobytes(), found.digest)

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()


@contextmanager
def open_checkpoints(folder: Path, *, keep: int | None = None) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a task and closes them at the end."""
    checkpoints = Checkpoints(folder, keep=keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def named_arrays(parameters: Any) -> dict[str, np.ndarray]:
    """Returns `{path: array}` on the host, by the names that the ledger records."""
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}


def read_parameters(folder: Path, round_number: int) -> dict[str, np.ndarray] | None:
    """Reads the weights of a round without knowing the model: `{path: array}`; None when it is not on disk.

    Raises:
        CheckpointError: the round is there and cannot be read.
    """
    tree = _read_state(folder.absolute() / str(round_number))
    return None if tree is None else named_arrays(tree["parameters"])


def read_step(folder: Path, round_number: int) -> Step:
    """Reads all that is kept of a round without knowing the model.

    Raises:
        CheckpointError: it cannot be read, or is not there.
    """
    step = folder.absolute() / str(round_number)
    with _reading(step):
        state, random, ledger = (_read_arrays(step / item) for item in ("state", "random", "ledger"))
        with ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=_alone()) as reader:
            return Step(state, random["key"], reader.restore(step / "accountant"), ledger["log"])


def _read_state(step: Path) -> Any:
    """The state of a round as it lies on disk; None when it is not there."""
    if not step.is_dir():
        return None
    with _reading(step):
        return _read_arrays(step / "state")


def _read_arrays(item: Path) -> Any:
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
        # Asked for as arrays of the host: what four devices have written, one can read.
        return reader.restore(item, jax.tree.map(_on_host, reader.metadata(item).item_metadata.tree))


@contextmanager
def _reading(step: Path) -> Iterator[None]:
    """Raises a CheckpointError for whatever Orbax trips over in a damaged file, an AttributeError too."""
    try:
        with _quiet_orbax():
            yield
    except Exception as error:
        raise CheckpointError(f"{step}: checkpoint unreadable: {_cause(error)}") from error


def _difference(step: Path, like: RoundState) -> str | None:
    """Names the first array that a round on disk has in another shape than this run, or that only one of them has."""
    try:
        with _quiet_orbax(), ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
            found = _shapes(reader.metadata(step / "state").item_metadata.tree)
    except Exception:  # damaged: what it was made by can't be told
        return None
    expected = _shapes(_plain(like))
    name = next((name for name in sorted(found | expected) if found.get(name) != expected.get(name)), None)
    if name is None:
        return None
    there, here = (f"{tree[name]}" if name in tree else "absent" for tree in (found, expected))
    return f"{name} is {there} there and {here} here"


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def read_clip_norm(folder: Path, round_number: int) -> float | None:
    """Reads the clip norm that the round after this one used; None when there is no such round, or none was kept.

    Raises:
        CheckpointError: the round is there and cannot be read.
    """
    tree = _read_state(folder.absolute() / str(round_number))
    return None if tree is None or "clip_norm" not in tree else float(tree["clip_norm"])


def latest_parameters(folder: Path, like: Any, recorded: Sequence[RoundRecord]) -> Any:
    """Reads the weights of the last round on disk into the structure of `like`.

    Args:
        folder: the task's checkpoints.
        like: weights of the same structure.
        recorded: the run's records; the round's own must vouch for the weights.

    Raises:
        CheckpointError: there is no round, it cannot be read, or it is not what the ledger recorded.
    """
    rounds = [int(step.name) for step in folder.glob("*") if step.name.isdigit()]
    found = read_parameters(folder, max(rounds)) if rounds else None
    if found is None:
        raise CheckpointError(f"{folder}: no checkpoint; let `capsfl train` finish first")
    record = next((r for r in recorded if r.task == folder.name and r.round == max(rounds)), None)
    check_recorded(record, found, folder / str(max(rounds)))
    return _like(like, found)


def check_recorded(record: RoundRecord | None, parameters: Any, place: Path) -> None:
    """Refuses weights that the ledger does not vouch for.

    Raises:
        CheckpointError: no record of the round, or a tensor that differs; names the first one.
    """
    leaf = first_difference({} if record is None else dict(record.leaves), tensor_leaves(parameters))
    if leaf is not None:
        raise CheckpointError(
            f"{place}: {leaf} is not what the ledger recorded; see `capsfl verify`, and delete this folder to go on "
            "from the round before it"
        )


def _alone() -> ocp.options.MultiprocessingOptions:
    """Has Orbax wait for no other process, since only this one reads."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, {own}, barrier_sync_key_prefix=f"process_{own}")


def _on_host(leaf: Any) -> np.ndarray:
    """An array of this shape and type that takes no memory: Orbax restores into the likes of it."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps the tracebacks that Orbax's threads log off the console; the error we raise says it in one line.

    After a failure its log stays quiet, for threads that Orbax has abandoned report late.
    """
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


def _cause(error: Exception) -> str:
    """What went wrong, in one line; the text in which TensorStore reports a full disk never gets to saying so."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "RESOURCE_EXHAUSTED" in str(error):
        return os.strerror(errno.ENOSPC)
    return " ".join(str(error).split())[:300]


def _plain(state: RoundState) -> dict[str, Any]:
    """The state as dictionaries of arrays, whose names on disk do not depend on library classes."""
    plain = {
        "parameters": _by_path(state.parameters),
        "round": state.round,
        "server": _by_path(state.server),
    }
    if state.controls is not None:
        plain["controls"] = _by_path(state.controls)
    if state.clip_norm is not None:
        plain["clip_norm"] = state.clip_norm
    if state.noise is not None:
        plain["noise"] = _by_path(state.noise)
    if state.statistics is not None:
        plain["statistics"] = _by_path(state.statistics)
    return plain


def _by_path(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _like(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """Puts arrays found by path into the structure of `tree`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _placed(arrays[path_name(path)]), tree)


def _placed(array: Any) -> jax.Array:
    """An array on a device; what Orbax has put there, over several processes perhaps, stays as it is."""
    return array if isinstance(array, jax.Array) else jnp.asarray(array)
