"""Results as a page of Markdown, and as tables for a terminal."""

import json
from pathlib import Path
from typing import Any

from capsfl.bench.pages import geyer, ingest, ledger, mnist, rounds, routing, scale, segcaps, segmenters, sweep
from capsfl.bench.pages.section import Section, Table, format_markdown

HEAD = """# Benchmarks

Generated from the JSON in `results/` by `python -m benchmarks.routing --table`. Measure with `capsfl bench NAME`, the
operators also from a checkout that has jax and numpy alone with `python -m benchmarks.routing`.
"""

SECTIONS: dict[str, Section] = {
    name: section
    for benchmark in (geyer, ingest, ledger, mnist, rounds, routing, scale, segcaps, segmenters, sweep)
    for name, section in benchmark.SECTIONS.items()
}
"""By what a result calls its benchmark."""


def write_page(folder: Path) -> str:
    """One page of Markdown from every result in a folder."""
    parts = [HEAD]
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        place = result["machine"]
        section = SECTIONS[result["benchmark"]]
        parts.append(f"## {section.title}, {_name_device(place)}\n")
        parts.append(f"{describe_machine(place)}\n")
        if result["quick"]:
            parts.append("**A quick run: small shapes, few runs. It shows that everything works, not how fast.**\n")
        parts.append(f"{section.reading}\n")
        if result["benchmark"] == "routing":
            parts.append(f"{routing.describe_roofs(result)}\n")
            picture = folder / f"roofline-{path.stem}.png"
            if picture.exists():
                parts.append(f"![Roofline of {path.stem}]({folder.name}/{picture.name})\n")
        picture = folder / f"{path.stem}.png"
        if picture.exists():
            parts.append(f"![Slices of {path.stem}]({folder.name}/{picture.name})\n")
        for table in section.tables(result):
            parts.append(f"### {table.title}\n\n{format_markdown(table, section.numbers)}\n")
    return "\n".join(parts)


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of one result."""
    return list(SECTIONS[result["benchmark"]].tables(result))


def describe_machine(place: dict[str, Any]) -> str:
    """What a result was measured on, in a line."""
    versions = ", ".join(f"{name} {value}" for name, value in place["versions"].items())
    driver = f", driver {place['driver']}" if place["driver"] else ""
    note = f" {place['note'][0].upper()}{place['note'][1:]}." if place["note"] else ""
    return (
        f"{place['devices']} x {place['device']}{driver}; {place['cpu_model']}, {place['cores']} cores, "
        f"{place['memory_bytes'] / 2**30:.0f} GiB; {versions}; {place['date']}.{note}"
    )


def _name_device(place: dict[str, Any]) -> str:
    return place["cpu_model"] if place["platform"] == "cpu" else place["device"]
