"""A sweep's folder: whose configuration it is, and its results, appended line by line as studies finish.

    sweep.json               the configuration and what it expands to
    parts/<i>-of-<n>.jsonl   a line per finished study, by the process that holds share i of n
    parts/<i>-of-<n>.json    what that process compiled and how long it took
    results.jsonl, .csv      all parts together, in order, with every study once

A process writes whole lines to a file of its own and nobody else's, so that a killed one leaves at most one torn line
behind, which is cut off before more is written. Whatever the number of processes was before, a study that has a line
anywhere is finished.
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from capsfl.study import write_json
from capsfl.sweeps.config import SweepConfig

Row = dict[str, Any]


class SweepFolderError(ValueError):
    """A folder that a sweep cannot use; the message names it and the remedy."""


class SweepFolder:
    """The folder of a sweep, opened for one of its processes; made by `SweepFolder.open`."""

    def __init__(self, path: Path, lines: IO[bytes], facts: Path) -> None:
        self.path = path
        self._lines = lines
        self._facts = facts

    @classmethod
    def open(cls, config: SweepConfig, *, part: int, parts: int, record: Mapping[str, Any]) -> "SweepFolder":
        """Founds the folder or resumes it.

        Args:
            config: of the sweep.
            part: this process's share, from 0.
            parts: shares altogether.
            record: further facts for `sweep.json`.

        Raises:
            SweepFolderError: the folder holds something else or another configuration's sweep, cannot be written, or
                another process is at work on the same share.
        """
        path = Path(config.out)
        before = _read_record(path)
        if before is None and path.is_dir() and any(path.iterdir()):
            raise SweepFolderError(
                f"{path}: not empty and no sweep (no sweep.json); choose another `out` or an empty folder"
            )
        if before is not None and before.get("configuration_hash") != config.digest():
            raise SweepFolderError(
                f"{path}: made by another configuration ({_difference(before['configuration'], config.table())}); "
                "choose another `out`, or delete the folder to start over"
            )
        try:
            (path / "parts").mkdir(parents=True, exist_ok=True)
            if before is None:
                write_json(path / "sweep.json", _new_record(path, config, record))
            name = path / "parts" / f"{part}-of-{parts}"
            lines = _open_alone(name.with_suffix(".jsonl"))
        except OSError as error:
            raise SweepFolderError(
                f"{path}: cannot be written ({error.strerror}); free space or choose another `out`"
            ) from error
        return cls(path, lines, name.with_suffix(".json"))

    def __enter__(self) -> "SweepFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def append(self, rows: Sequence[Row]) -> None:
        """Writes finished studies in one go and waits until the disk has them."""
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        self._lines.write(text.encode())
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def record_execution(self, facts: Mapping[str, Any]) -> None:
        """Keeps what this process compiled and how long it took."""
        write_json(self._facts, facts)


def merge_results(path: Path) -> list[Row]:
    """Writes `results.jsonl` and `results.csv` from the lines of all processes; returns the rows in order."""
    rows = [row for _, row in sorted(read_rows(path).items())]
    _replace(path / "results.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    _replace(path / "results.csv", format_csv(rows))
    return rows


def read_rows(path: Path) -> dict[int, Row]:
    """Finished studies of a sweep's folder by number; a line still being written is left for later.

    Raises:
        SweepFolderError: a whole line is damaged.
    """
    found: dict[int, Row] = {}
    for file in sorted((path / "parts").glob("*-of-*.jsonl")):
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                found.setdefault(int(row["study"]), row)
            except (ValueError, KeyError, TypeError) as error:
                raise SweepFolderError(f"{file}: line {number} is damaged; delete that line to run it again") from error
    return found


def format_csv(rows: Iterable[Row]) -> str:
    """Rows as a table: a column per swept field, per figure and per score; curves are left to the JSON lines."""
    flat = []
    for row in rows:
        scores = {f"score.{name}": value for name, value in row["scores"].items()}
        plain = {name: value for name, value in row.items() if not isinstance(value, (dict, list))}
        flat.append({"study": row["study"], "seed": row["seed"], **row["setting"], **plain, **scores})
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in flat:
        writer.writerow({name: json.dumps(v) if isinstance(v, (list, tuple)) else v for name, v in row.items()})
    return text.getvalue()


def _open_alone(path: Path) -> IO[bytes]:
    """Opens a file of lines for appending, without a torn last line, refusing to share it."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SweepFolderError(
            f"{path}: another process is at work on this part; give every process a --part of its own"
        ) from None
    except OSError:
        pass  # a file system without locks; the parts are still told apart by their names
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
    return file


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _read_record(path: Path) -> dict[str, Any] | None:
    file = path / "sweep.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise SweepFolderError(f"{file}: unreadable ({error}); delete the folder to start over") from error
    if not isinstance(record, dict) or not isinstance(record.get("configuration"), dict):
        raise SweepFolderError(f"{file}: not a sweep's record; delete the folder to start over")
    return record


def _new_record(path: Path, config: SweepConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": path.name,
        **record,
        "configuration": config.table(),
        "configuration_hash": config.digest(),
        "versions": {name: version(name) for name in ("capsfl", "jax", "flax")},
    }


def _difference(old: Any, new: Any, trail: str = "") -> str:
    """Names the first field that differs, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *(name for name in old if name not in new)]:
            if old.get(name) != new.get(name):
                return _difference(old.get(name), new.get(name), f"{trail}.{name}" if trail else name)
    return f"{trail} was {json.dumps(old)[:80]}, is {json.dumps(new)[:80]}"
