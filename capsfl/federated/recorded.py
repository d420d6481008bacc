"""The L that a run has chosen, kept in its folder so that whoever resumes it runs the same program."""

import json
from pathlib import Path

from capsfl.federated.chunks import Choice
from capsfl.federated.devices import DevicesConfig

FILE = "chunks.json"


def recall_chunk(folder: Path, task: str, config: DevicesConfig) -> DevicesConfig:
    """Returns the layout with the L that an earlier start of this run chose for a task, unless one is given.

    Raises:
        ValueError: the record cannot be read; the message names the file.
    """
    if config.chunk is not None:
        return config
    found = _read(folder / FILE).get(task)
    return config if found is None else config.model_copy(update={"chunk": found["chunk"]})


def record_choice(folder: Path, task: str, choice: Choice | None) -> None:
    """Writes down what was chosen, before anything of the round it was chosen in; once per task."""
    path = folder / FILE
    if choice is None or task in (record := _read(path)):
        return
    record[task] = {**choice._asdict(), "trials": [trial._asdict() for trial in choice.trials]}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _read(path: Path) -> dict[str, dict]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert all(isinstance(entry["chunk"], int) and entry["chunk"] > 0 for entry in record.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"{path}: unreadable; delete it, and give the same --devices.chunk as before if the run is to repeat "
            "bit for bit"
        ) from error
    return record
