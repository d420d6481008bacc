"""`capsfl doctor`: what works on this machine and what to install."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from capsfl.arguments import parse


@dataclass(frozen=True)
class DoctorCommand:
    """Devices, versions, decoders and extras: what works here and what to install."""


def run(words: list[str]) -> int:
    """Says what works here; exit code 1 when something that is needed does not."""
    parse(DoctorCommand, words, prog="capsfl doctor")
    from capsfl.doctor import examine

    table = Table("part", "state", "remedy", box=None, pad_edge=False)
    rows = examine()
    for row in rows:
        table.add_row(row.part, f"[green]{row.state}[/]" if row.works else f"[red]{row.state}[/]", row.remedy)
    Console().print(table)
    return 0 if all(row.works or row.optional for row in rows) else 1
