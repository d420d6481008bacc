"""The studies of a sweep, read from its folder and put together over their seeds."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import t as students_t

from capsfl.report.study import Record, StudyError, number, number_at, record_at, text

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """One setting over its seeds.

    Attributes:
        setting: swept fields and their values.
        group: the static part of the setting, in words.
        epsilon: what each of its studies guarantees; None where nothing does.
        noiseless: whether no noise was added, so that nothing is claimed.
        values: utility of every seed that came to an end.
        diverged: seeds that did not.
        mean: of `values`; None where there is none.
        low: lower end of the 95 % t-interval of the mean over seeds; None below two seeds.
        high: upper end.
        rows: the lines as recorded.
    """

    setting: Mapping[str, Any]
    group: str
    epsilon: float | None
    noiseless: bool
    values: Sequence[float]
    diverged: int
    mean: float | None
    low: float | None
    high: float | None
    rows: Sequence[Record] = field(repr=False, default=())

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """Mean over seeds of a score at every scored round."""
        found: dict[float, list[float]] = {}
        for row in self.rows:
            for point in row.get("curve") or ():
                place, value = number_at(point, "round"), number_at(point, metric)
                if place is not None and value is not None:
                    found.setdefault(place, []).append(value)
        return [(place, statistics.fmean(values)) for place, values in sorted(found.items())]


def read_sweep(folder: Path) -> tuple[Record, list[Record], list[Record]]:
    """Returns `sweep.json`, the finished studies and what each process compiled.

    Raises:
        StudyError: no sweep there, or a damaged file.
    """
    file = folder / "sweep.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        facts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "parts").glob("*.json"))]
    except OSError as error:
        raise StudyError(f"{error.filename}: {error.strerror}; name the folder that `capsfl sweep` wrote") from error
    except ValueError as error:
        raise StudyError(f"{folder}: a damaged file ({error}); run the sweep's command again to mend it") from error
    if not isinstance(record, dict) or not all(isinstance(row, dict) for row in rows):
        raise StudyError(f"{file}: not a sweep's record; name the folder that `capsfl sweep` wrote")
    return record, rows, facts


def summarise(rows: Iterable[Record]) -> list[Summary]:
    """Puts the seeds of every setting together, in the order of the sweep."""
    settings: dict[str, list[Record]] = {}
    for row in rows:
        settings.setdefault(json.dumps(record_at(row, "setting"), sort_keys=True), []).append(row)
    return [_summary(members) for members in settings.values()]


def _summary(rows: Sequence[Record]) -> Summary:
    values = [v for row in rows if row.get("status") == "finished" and (v := number_at(row, "utility")) is not None]
    mean, low, high = mean_interval(values) or (None, None, None)
    first = rows[0]
    noise, local = number_at(first, "noise_multiplier"), text(first.get("accountant"))
    return Summary(
        record_at(first, "setting"),
        text(first.get("group")),
        number_at(first, "epsilon"),
        noise == 0 and "aplace" not in local and number_at(first, "epsilon") is None,
        values,
        len(rows) - len(values),
        mean,
        low,
        high,
        rows,
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None] | None:
    """The mean and its 95 % t-interval (Student 1908), which takes two values; None of nothing."""
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    quantile = float(students_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def private(rows: Iterable[Summary]) -> list[Summary]:
    """Settings with an epsilon and a mean, by rising epsilon."""
    found = [row for row in rows if row.epsilon is not None and row.mean is not None]
    return sorted(found, key=lambda row: (row.epsilon or 0.0, -(row.mean or 0.0)))


def frontier(rows: Iterable[Summary]) -> list[Summary]:
    """Settings that nobody with an epsilon at most theirs does better than, by rising epsilon."""
    best: list[Summary] = []
    for row in private(rows):
        if not best or (row.mean or 0.0) > (best[-1].mean or 0.0):
            best.append(row)
    return best


def best_within(rows: Iterable[Summary], budget: float) -> Summary | None:
    """The setting of highest mean whose epsilon is at most `budget`."""
    return max(
        (row for row in private(rows) if (row.epsilon or 0.0) <= budget), key=lambda row: row.mean or 0.0, default=None
    )


def by_group(rows: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Settings by the static part of their setting."""
    groups: dict[str, list[Summary]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def numeric_fields(rows: Sequence[Summary]) -> list[str]:
    """Swept fields whose values are numbers, and differ."""
    fields = dict.fromkeys(name for row in rows for name in row.setting)
    found = []
    for name in fields:
        values = [number(row.setting.get(name)) for row in rows]
        if None not in values and len(set(values)) > 1:
            found.append(name)
    return found
