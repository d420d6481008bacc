"""The un-noised curves of a run: what each round did, as JSON lines; for their owner's eyes, never for the ledger."""

import json
from collections.abc import Mapping
from pathlib import Path

from capsfl.federated.federation import RoundReport
from capsfl.progress import read_rounds


class MetricsLog:
    """A run's `metrics.jsonl`.

    Args:
        path: the file.
        member: the hospital that trains alone, if one does.
    """

    def __init__(self, path: Path, *, member: str | None) -> None:
        self._path = path
        self._member = {} if member is None else {"member": member}

    def keep_until(self, task: str, round_number: int) -> None:
        """Drops the lines of rounds after the one a run resumes from; those rounds will be run again."""
        if not self._path.exists():
            return
        kept = [row for row in read_rounds(self._path) if row["task"] != task or row["round"] <= round_number]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        partial = self._path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self._path)

    def append(
        self,
        task: str,
        report: RoundReport,
        scores: Mapping[str, Mapping[str, float]],
        epsilon: float | None,
        figures: Mapping[str, float | int],
    ) -> None:
        """Writes one round."""
        hospitals: dict[str, dict[str, float]] = {name: dict(values) for name, values in scores.items()}
        for name, loss in report.hospital_loss.items():
            hospitals.setdefault(name, {})["loss"] = loss
        row = {
            **self._member,
            "task": task,
            "round": report.round,
            "loss": report.loss,
            "epsilon": epsilon,
            **figures,
            "cohort": list(report.cohort),
            "update_norm": report.update_norm,
            "not_finite": list(report.not_finite),
            "dropped": list(report.dropped),
            **({"spread": report.spread} if report.spread else {}),
            **({"votes": report.votes, "vote_weights": report.vote_weights} if report.votes else {}),
            "hospitals": hospitals,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
