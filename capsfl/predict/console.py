"""What `capsfl predict` prints: a line per scan or patient, and what was left out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from capsfl.ct.export import NOTICE


def show(rows: Sequence[Mapping[str, Any]], refused: Sequence[tuple[str, str]], console: Console) -> None:
    """Prints the table of a call's results, what was left out, and what they are not for."""
    for kind, words in (("volume", _scan), ("pictures", _patient)):
        table = Table(*HEADS[kind], box=None, pad_edge=False)
        for row in rows:
            if row["kind"] == kind:
                table.add_row(*map(escape, words(row)))
        if table.row_count:
            console.print(table)
    for name, fault in refused:
        console.print(f"[red]left out[/] {escape(name)}: {escape(fault)}", soft_wrap=True, highlight=False)
    console.print(f"[bold]{NOTICE}[/]")


HEADS = {
    "volume": ("scan", "slices", "marked mL", "probability", "remark"),
    "pictures": ("patient", "pictures", "probability", "remark"),
}


def _scan(row: Mapping[str, Any]) -> tuple[str, ...]:
    volume = "–" if row["mask_ml"] is None else f"{row['mask_ml']:.0f} {row['target']}"
    return row["scan"], str(row["slices"]), volume, _chance(row), "; ".join(row["remarks"])


def _patient(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["scan"], str(len(row["pictures"])), _chance(row), "; ".join(row["remarks"])


def _chance(row: Mapping[str, Any]) -> str:
    """The probability of disease; of several classes also the likeliest."""
    if row["probability"] is None:
        return "–"
    found = list(row["class_probabilities"])
    named = f" ({row['classes'][found.index(max(found))]} {max(found):.3f})" if len(found) > 2 else ""
    return f"{row['probability']:.3f}{named}"
