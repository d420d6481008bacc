"""`capsfl report RUN|SWEEP`: writes the page again; with `--out PAGE`, the paper's figures from all results on one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from capsfl.arguments import ArgumentsError, parse


@dataclass(frozen=True)
class ReportCommand:
    """Write the page of a study or a sweep again from what is in its folder; works while it is still running.

    With --out, one page with the figures of Kumar et al. 2020 and ours from all the results named.
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that `capsfl train` or `capsfl sweep` wrote; with --out also results of `capsfl bench segmenters`."""
    out: Path | None = None
    """A page (HTML) of all figures that the results hold, each with the command that makes it again; it says which
    figures are missing."""
    picture: Path | None = None
    """Also draw a study's summary picture (PNG) here; a sweep's frontier lies in its folder."""


def run(words: list[str]) -> int:
    """Writes pages again, or one page of figures."""
    given = parse(ReportCommand, words, prog="capsfl report")
    if not given.results:
        raise ArgumentsError("capsfl report: name a folder that `capsfl train` or `capsfl sweep` wrote")
    if given.picture is not None and (len(given.results) > 1 or given.out is not None):
        raise ArgumentsError(f"capsfl report: --picture {given.picture}: takes one study and no --out")
    if given.out is not None:
        return write_figures(given.results, given.out)
    for place in given.results:
        write_page(place)
    if given.picture is not None:
        from capsfl.report import summary_picture
        from capsfl.study import disk_errors

        with disk_errors(given.picture):
            summary_picture(next(iter(given.results)), given.picture)
        print(f"picture: {given.picture}")
    return 0


def write_page(place: Path) -> None:
    """Writes the page of a study or a sweep into its folder."""
    from capsfl.report import build_page, build_sweep_page
    from capsfl.study import disk_errors

    with disk_errors(place):
        merge_parts(place)
        page = build_sweep_page(place) if (place / "sweep.json").exists() else build_page(place)
    print(f"page: {page}")


def write_figures(places: tuple[Path, ...], out: Path) -> int:
    """Writes the page of figures and says what it lacks."""
    from capsfl.report import build_figures_page
    from capsfl.study import disk_errors

    if out.is_dir() or out.suffix.lower() not in (".html", ".htm"):
        raise ArgumentsError(f"capsfl report: --out {out}: name a file, such as {out.with_suffix('') / 'figures.html'}")
    for place in places:
        with disk_errors(place):
            merge_parts(place)
    with disk_errors(out):
        page, missing = build_figures_page(places, out)
    print(f"page: {page}")
    for figure in missing:
        print(f"missing: {figure.number}, {figure.title}: {figure.command}")
    return 0


def merge_parts(place: Path) -> None:
    """Puts together what the processes of a sweep have written so far."""
    if (place / "sweep.json").exists():
        from capsfl.sweeps.results import merge_results

        merge_results(place)
