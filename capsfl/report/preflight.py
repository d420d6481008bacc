"""A preflight as a table and a page for every hospital, and as a table on the console."""

import csv
import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from capsfl.ct.preflight import Preflight, Shared
from capsfl.ct.preflight_scan import SeriesFinding
from capsfl.report import figures
from capsfl.report.page import distinct_names, environment, write_whole
from capsfl.report.preflight_charts import colour_of, grey_chart, hu_chart, lung_chart

MAX_ROWS = 400
MAX_LISTED = 12

COLUMNS = (
    *("hospital", "patient", "kind", "accepted", "fault", "reason", "remedy", "warnings", "images", "rows", "columns"),
    *("spacing_z_mm", "spacing_y_mm", "spacing_x_mm", "slice_thickness_mm", "tube_voltage_kv", "scanner", "kernel"),
    *("encoding", "label", "split", "padding_share", "lung_ml", "shared_with", "histogram"),
)


def write_preflight(preflight: Preflight, out: Path) -> tuple[Path, ...]:
    """Write `<hospital>.csv` and `<hospital>.html` into a folder; returns the pages.

    Raises:
        OSError: the folder is read-only or full.
    """
    out.mkdir(parents=True, exist_ok=True)
    pages = []
    for hospital in preflight.hospitals:
        write_whole(out / f"{hospital}.csv", _csv(preflight, hospital))
        pages.append(write_whole(out / f"{hospital}.html", distinct_names(_page(preflight, hospital))))
    return tuple(pages)


def print_preflight(preflight: Preflight, console: Console) -> None:
    """Print a line a hospital, then what is refused and what is shared."""
    table = Table(box=None, pad_edge=False)
    for name in ("hospital", "series", "usable", "refused", "images", "scanners", "warnings", "shared"):
        table.add_column(name, justify="left" if name in ("hospital", "scanners") else "right")
    for hospital in preflight.hospitals:
        rows, shared = _of(preflight, hospital)
        refused = sum(not row.accepted for row in rows)
        table.add_row(
            hospital,
            str(len(rows)),
            str(len(rows) - refused),
            f"[red]{refused}[/]" if refused else "0",
            str(sum(row.images for row in rows)),
            escape(_few(sorted({row.scanner for row in rows if row.scanner}), 3)),
            str(sum(len(row.warnings) for row in rows)),
            f"[red]{len(shared)}[/]" if shared else "0",
        )
    console.print(table)
    lines = [f"{row.hospital}/{row.patient}: {row.fault}: {row.reason}" for row in preflight.findings if row.fault]
    lines += [shared_words(pair) for pair in preflight.shared]
    lines += [f"note: {note}" for note in preflight.notes]
    for line in lines[:MAX_LISTED]:
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
    if len(lines) > MAX_LISTED:
        console.print(f"  and {len(lines) - MAX_LISTED} more on the pages", highlight=False)


def shared_words(pair: Shared) -> str:
    """One line about two entries."""
    reasons = ["one patient's id"] * pair.same_patient
    reasons += [f"{pair.images} equal image{'s' * (pair.images != 1)}"] * bool(pair.images)
    reasons += [f"{pair.alike} picture{'s' * (pair.alike != 1)} that look alike"] * bool(pair.alike)
    classes = ", under different classes" if pair.classes_differ else ""
    return f"{'/'.join(pair.first)} and {'/'.join(pair.second)} share {' and '.join(reasons)}{classes}"


def _of(preflight: Preflight, hospital: str) -> tuple[list[SeriesFinding], list[Shared]]:
    rows = [row for row in preflight.findings if row.hospital == hospital]
    return rows, [pair for pair in preflight.shared if hospital in (pair.first[0], pair.second[0])]


def _csv(preflight: Preflight, hospital: str) -> str:
    rows, shared = _of(preflight, hospital)
    others: dict[str, list[str]] = defaultdict(list)
    for pair in shared:
        for here, there in ((pair.first, pair.second), (pair.second, pair.first)):
            if here[0] == hospital:
                others[here[1]].append("/".join(there))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        spacing = row.spacing_mm or ("", "", "")
        cells = [row.hospital, row.patient, row.kind, int(row.accepted), row.fault, row.reason, row.remedy]
        cells += ["; ".join(row.warnings), row.images, row.rows, row.columns, *spacing, row.slice_thickness_mm]
        cells += [row.tube_voltage_kv, row.scanner, row.kernel, row.encoding, row.label, row.split]
        cells += [_rounded(row.padding_share), _rounded(row.lung_ml), " ".join(others[row.patient])]
        cells += [" ".join(map(str, row.histogram))]
        writer.writerow([_cell(cell) for cell in cells])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _page(preflight: Preflight, hospital: str) -> str:
    rows, shared = _of(preflight, hospital)
    faults: dict[str, list[SeriesFinding]] = defaultdict(list)
    for row in rows:
        if row.fault:
            faults[row.fault].append(row)
    volumes = [row for row in rows if row.accepted and row.kind == "volume"]
    pictures = [row for row in rows if row.accepted and row.kind == "pictures"]
    scanners = [name for name, _ in Counter(row.scanner or "unknown" for row in volumes).most_common()]
    return (
        environment()
        .get_template("preflight.html.j2")
        .render(
            hospital=hospital,
            light=figures.LIGHT,
            dark=figures.DARK,
            headlines=_headlines(rows, volumes, pictures, shared, hospital),
            volume_rows=[row for row in rows[:MAX_ROWS] if row.kind == "volume"],
            picture_rows=[row for row in rows[:MAX_ROWS] if row.kind == "pictures"],
            hidden=max(0, len(rows) - MAX_ROWS),
            faults=[
                {"name": name, "count": len(found), "rows": _reasons(found)}
                for name, found in sorted(faults.items(), key=lambda item: -len(item[1]))
            ],
            warnings=[(row.patient, warning) for row in rows for warning in row.warnings],
            shared=[shared_words(pair) for pair in shared],
            across=sum(pair.across_hospitals for pair in shared),
            scanners=_scanners(volumes, scanners),
            histogram=Markup(hu_chart(volumes, scanners)) if volumes else None,
            lungs=Markup(lung_chart(volumes, scanners)) if volumes else None,
            greys=Markup(grey_chart(pictures, preflight.classes)) if pictures else None,
            files=_files(pictures, preflight.classes),
            notes=preflight.notes,
            has_pictures=any(row.kind == "pictures" for row in rows),
        )
    )


def _headlines(
    rows: Sequence[SeriesFinding],
    volumes: Sequence[SeriesFinding],
    pictures: Sequence[SeriesFinding],
    shared: Sequence[Shared],
    hospital: str,
) -> list[dict[str, str]]:
    refused = sum(not row.accepted for row in rows)
    what = "entries" if pictures else "series"
    found = [
        {
            "label": f"Usable {what}",
            "value": f"{len(rows) - refused} of {len(rows)}",
            "tone": "bad" if refused else "good",
            "words": f"{refused} refused" if refused else "none refused",
        }
    ]
    if volumes:
        steps = [row.spacing_mm[0] for row in volumes if row.spacing_mm]
        low, high = min(steps), max(steps)
        value = f"{low:.3g} mm" if high - low < 0.005 else f"{low:.3g}–{high:.3g} mm"
        thin = "nearly isotropic" if high <= 1.5 else "coronal and sagittal planes are interpolated"
        words = f"{sum(row.images for row in volumes)} slices; {thin}"
        found.append({"label": "Between slices", "value": value, "tone": "", "words": words})
        lungs = [row.lung_ml / 1000 for row in volumes if row.lung_ml]
        missing = sum(not row.lung_ml for row in volumes)
        found.append(
            {
                "label": "Lung volume, median",
                "value": f"{statistics.median(lungs):.1f} L" if lungs else "–",
                "tone": "warn" if missing else "good",
                "words": f"{missing} without a lung" if missing else f"{min(lungs):.1f} to {max(lungs):.1f} L",
            }
        )
    if pictures:
        count = sum(row.images for row in pictures)
        words = f"of {len(pictures)} patients; grey values, not Hounsfield units"
        found.append({"label": "Pictures", "value": str(count), "tone": "warn", "words": words})
    across = sum(pair.across_hospitals for pair in shared)
    found.append(
        {
            "label": "Shared with another hospital",
            "value": str(across),
            "tone": "bad" if across else "good",
            "words": "the same patient or the same images" if across else "no patient, no image",
        }
    )
    return found


def _reasons(rows: Iterable[SeriesFinding]) -> list[dict[str, Any]]:
    """Equal reasons once, with whom they concern."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        found[row.reason, row.remedy].append(row.patient)
    return [
        {"reason": reason, "remedy": remedy, "patients": _few(patients, 6)}
        for (reason, remedy), patients in found.items()
    ]


def _scanners(volumes: Sequence[SeriesFinding], names: Sequence[str]) -> list[dict[str, Any]]:
    table = []
    for place, name in enumerate(names):
        rows = [row for row in volumes if (row.scanner or "unknown") == name]
        spacings = sorted({f"{row.spacing_mm[0]:.2f} × {row.spacing_mm[1]:.3f}" for row in rows if row.spacing_mm})
        voltages = sorted({f"{row.tube_voltage_kv:g}" for row in rows if row.tube_voltage_kv})
        table.append(
            {
                "name": name,
                "colour": colour_of(place),
                "count": len(rows),
                "kernels": _few(sorted({row.kernel for row in rows if row.kernel}), 6) or "–",
                "spacings": _few(spacings, 4),
                "voltages": _few(voltages, 4) or "–",
                "labels": ", ".join(f"{n} x {label}" for label, n in sorted(Counter(map(_label, rows)).items())),
            }
        )
    return table


def _files(pictures: Sequence[SeriesFinding], classes: Sequence[str]) -> list[dict[str, Any]]:
    """What the files alone give away of the class: formats, modes, sizes."""
    table = []
    for label in sorted({row.label for row in pictures}, key=str):
        rows = [row for row in pictures if row.label == label]
        formats: Counter[str] = Counter()
        for row in rows:
            for part in row.encoding.split(", "):
                count, _, name = part.partition(" x ")
                formats[name] += int(count)
        table.append(
            {
                "class": classes[label] if label is not None and label < len(classes) else "unknown",
                "patients": len(rows),
                "pictures": sum(row.images for row in rows),
                "formats": ", ".join(f"{count} x {name}" for name, count in formats.most_common()),
                "size": f"{statistics.median(r.rows for r in rows):g} × {statistics.median(r.columns for r in rows):g}",
            }
        )
    return table


def _label(row: SeriesFinding) -> str:
    return "unlabelled" if row.label is None else f"class {row.label}"


def _few(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
