"""Runs a benchmark as asked on the command line: measures, writes, prints."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsfl.bench import page, roofline
from capsfl.bench.machine import results_folder, write_result
from capsfl.bench.pages.routing import describe_roofs
from capsfl.bench.pages.section import format_markdown


@dataclass(frozen=True)
class Output:
    """Where a result goes."""

    out: Path | None = None
    """Folder for the JSON and the picture; by default benchmarks/results of the checkout."""
    json: bool = False
    """Print the result as JSON instead of tables."""


def rewrite_page(folder: Path) -> Path:
    """Writes README.md beside a folder of results from all of them."""
    path = folder.resolve().parent / "README.md"
    path.write_text(page.write_page(folder), encoding="utf-8")
    return path


def redraw(folder: Path) -> None:
    """Rewrites the page, and the pictures where matplotlib is there, without measuring anything."""
    for path in sorted(folder.glob("routing-*.json")):
        _draw(json.loads(path.read_text(encoding="utf-8")), path)
    print(f"page: {rewrite_page(folder)}")


def finish(result: dict[str, Any], output: Output) -> None:
    """Writes a result, its picture and, in a checkout, the page; prints tables or JSON."""
    folder = results_folder(output.out)
    shown = result.pop("shown", None)
    path = write_result(folder, result)
    # Slices of real scans, whose licences differ: drawn where a folder was asked for, never into the checkout.
    if shown and output.out is not None:
        # Not for the operators' benchmark, which has jax and numpy alone.
        from capsfl.bench import segmenter_picture

        segmenter_picture.draw(shown, path.with_suffix(".png"))
    if result["benchmark"] == "routing":
        _draw(result, path)
    written = [path]
    if output.out is None:
        written.append(rewrite_page(folder))
    if output.json:
        print(json.dumps(result))
        return
    print_tables(result)
    print("\n".join(f"written: {place}" for place in written))


def say(line: str) -> None:
    """Tells on standard error what is done, since measuring takes minutes."""
    print(line, file=sys.stderr, flush=True)


def print_tables(result: dict[str, Any]) -> None:
    """Prints the tables of a result; as Markdown where rich is not installed."""
    section = page.SECTIONS[result["benchmark"]]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for table in section.tables(result):
            print(f"{table.title}\n\n{format_markdown(table, section.numbers)}\n")
        return
    console = Console()
    console.print(page.describe_machine(result["machine"]), highlight=False)
    if result["benchmark"] == "routing":
        console.print(describe_roofs(result), highlight=False)
    for table in section.tables(result):
        shown = Table(title=f"\n{table.title}", title_justify="left", box=None, pad_edge=False, title_style="bold")
        for name in table.columns:
            shown.add_column(name, justify="right" if name in section.numbers else "left")
        for words in table.rows:
            shown.add_row(*words)
        console.print(shown)


def _draw(result: dict[str, Any], path: Path) -> None:
    try:
        roofline.draw(result, path.with_name(f"roofline-{path.stem}.png"))
    except ImportError as error:
        say(f"no picture: {error}; pip install matplotlib, then --table draws it")
