"""`capsfl verify RUN`: recomputes and checks every ledger of a study."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from capsfl.arguments import parse


@dataclass(frozen=True)
class VerifyCommand:
    """Recompute every digest, epsilon and signature of a study; exit code 1 when anything differs."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder that `capsfl train` wrote."""
    witness: Path | None = None
    """A copy of one run's ledger/head, kept elsewhere: only against it can a rollback show."""
    strict: bool = False
    """Exit with 1 also on warnings and where something could not be verified that should be; what lies with others by
    design, a witness, voters or hospitals, aside."""
    json: bool = False
    """Print findings as JSON."""


def run(words: list[str]) -> int:
    """Checks a study's ledgers."""
    given = parse(VerifyCommand, words, prog="capsfl verify")
    from capsfl.audit import audit_study, finding_row
    from capsfl.ledger.verify import Status

    witness = given.witness.read_bytes() if given.witness else None
    findings = audit_study(given.run, witness_head=witness)
    failed = [(name, f) for name, rows in findings.items() for f in rows if f.status is Status.FAILED]
    doubtful = (Status.UNVERIFIABLE, Status.WARNING)
    open_ = [f for rows in findings.values() for f in rows if f.doubtful]
    code = 1 if failed or (given.strict and open_) else 0
    if given.json:
        rows = {name: [finding_row(f) for f in rows] for name, rows in findings.items()}
        print(json.dumps({"ok": not code, "runs": rows}, indent=1))
        return code
    console = Console()
    table = Table("run", "check", "OK", "warning", "unverifiable", "FAILED", box=None, pad_edge=False)
    for name, rows in findings.items():
        for check in dict.fromkeys(f.check for f in rows):
            found = [f.status for f in rows if f.check == check]
            counts = [str(found.count(s) or "-") for s in (Status.OK, *doubtful[::-1], Status.FAILED)]
            table.add_row(name, check, *counts)
    console.print(table)
    for name, finding in failed:
        moment = f"{finding.task} round {finding.round}" if finding.round is not None else ""
        where = [finding.check, moment, finding.leaf or ""]
        console.print(
            f"[red]FAILED[/] {name}: {escape(' '.join(w for w in where if w))}: {escape(finding.detail)}",
            soft_wrap=True,
            highlight=False,
        )
    for status in doubtful[::-1]:
        details = {f.detail for rows in findings.values() for f in rows if f.status is status}
        for detail in sorted(details)[:10]:
            console.print(f"{status.value}: {detail}", soft_wrap=True, highlight=False, markup=False)
    if not failed:
        console.print("[green]verified[/]: everything that can be recomputed agrees with the ledgers")
        if code:
            console.print("[red]strict[/]: something could not be recomputed, or is not as it was (above)")
    return code
