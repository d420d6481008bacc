"""What a user sees of runs: read from the curves they write, finished or not."""

import io
import json
from pathlib import Path

from rich.console import Console

from capsfl.progress import read_rounds, show_rounds


def row(task: str, number: int, not_finite: list[str]) -> str:
    """A line of a run's curves."""
    return (
        json.dumps(
            {
                "task": task, "round": number, "loss": 0.5, "epsilon": None, "not_finite": not_finite,
                "hospitals": {"A": {"loss": 0.5, "dice": 0.25}},
            }
        )
        + "\n"
    )  # fmt: skip


def shown(folder: Path) -> list[str]:
    """Lines that a console without a terminal gets."""
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=False)
    with show_rounds({"federated": folder}, {"segmentation": 3}, console=console):
        pass
    return [line.strip() for line in text.getvalue().splitlines()]


def test_a_hospital_that_returns_nan_is_named_once_with_its_first_round_though_later_ones_were_whole(tmp_path: Path):
    lines = [row("segmentation", 1, []), row("segmentation", 2, ["B"]), row("segmentation", 3, ["B", "C"])]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    warnings = [line for line in shown(tmp_path) if "warning" in line]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning federated: segmentation round 2 leaves out B, whose update was not finite; ")
    assert "round 3 leaves out C" in warnings[1]


def test_a_finished_stage_gets_one_line_and_an_unfinished_one_none(tmp_path: Path):
    assert shown(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(row("segmentation", 2, []))
    assert shown(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(row("segmentation", 3, []))
    assert shown(tmp_path) == ["federated  segmentation loss 0.500 dice 0.25"]


def test_a_line_still_being_written_is_left_for_later(tmp_path: Path):
    whole, half = row("segmentation", 1, []), row("segmentation", 2, [])[:40]
    (tmp_path / "metrics.jsonl").write_text(whole + half)
    assert [found["round"] for found in read_rounds(tmp_path / "metrics.jsonl")] == [1]
