"""`capsfl report RUN|SWEEP`: writes the page again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from capsfl.arguments import parse


@dataclass(frozen=True)
class ReportCommand:
    """Write the page of a study or a sweep again from what is in its folder; works while it is still running."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder that `capsfl train` or `capsfl sweep` wrote."""
    picture: Path | None = None
    """Also draw a study's summary picture (PNG) here; a sweep's frontier lies in its folder."""


def run(words: list[str]) -> int:
    """Writes the page again."""
    given = parse(ReportCommand, words, prog="capsfl report")
    from capsfl.report import build_page, build_sweep_page, summary_picture
    from capsfl.study import disk_errors

    if (given.run / "sweep.json").exists():
        from capsfl.sweeps.results import merge_results

        with disk_errors(given.run):
            merge_results(given.run)
            print(f"page: {build_sweep_page(given.run)}")
        return 0
    with disk_errors(given.run):
        print(f"page: {build_page(given.run)}")
    if given.picture is not None:
        with disk_errors(given.picture):
            summary_picture(given.run, given.picture)
        print(f"picture: {given.picture}")
    return 0
