"""`capsfl ingest SOURCE OUT`: brings scans into standard volumes, or looks at them first."""

from dataclasses import dataclass
from dataclasses import field as option
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import ValidationError
from rich.console import Console

from capsfl.arguments import parse
from capsfl.ct.reader import ReaderConfig
from capsfl.settings import explain


@dataclass(frozen=True)
class IngestCommand:
    """Bring scans into standard volumes on disk (Zarr3), one per patient, continuing what is there already."""

    source: Annotated[Path, tyro.conf.Positional]
    """A manifest (CSV), a folder holding manifest.csv, a DICOM series folder, a NIfTI file, or a collection's top
    folder."""
    out: Annotated[str | None, tyro.conf.Positional] = None
    """Folder for the volumes and index.csv, or its URL (s3://, gs://); AWS_ENDPOINT_URL names an S3 store other than
    Amazon's. With --check folder for the tables and pages, by default preflight."""
    check: bool = False
    """Store nothing: look at every series and write a table and a page for every hospital."""
    root: Path | None = None
    """Folder the manifest's paths start from; by default the manifest's own."""
    preset: Literal["tiny", "half", "full"] = "tiny"
    """128, 256 or 512 voxels a side."""
    window: Literal["fixed", "scanner"] = "fixed"
    """Window recorded for the models."""
    reader: ReaderConfig = option(default_factory=ReaderConfig)
    """What the readers may mend."""
    on_error: Literal["raise", "skip"] = "raise"
    """Stop at a scan that cannot be read, or leave it out by name."""
    processes: int | None = None
    """Scans read at once; by default one per core."""
    collection: str | None = None
    """What the folder is: covid-ct, covidx-ct, cc-19, mosmed, covid-19-ct-seg, sars-cov-2-ct, nifti-folder,
    image-folder, dicom-folder (any tree of series), or manifest. The options below need it."""
    hospitals: str | None = None
    """Who holds which patient: collection (its own sites), scanner, or drawn: even, dirichlet."""
    count: int | None = None
    """Hospitals of a draw; 3 when absent."""
    alpha: float | None = None
    """Concentration of dirichlet; 0.5 when absent, smaller is more skewed."""
    seed: int | None = None
    """Seed of drawn hospitals and splits."""
    split: str | None = None
    """official (the collection's lists where it has them), drawn, or study."""
    labels: str | None = None
    """disease (COVID against the rest) or all (every class)."""
    classes: tuple[str, ...] | None = None
    """Class folders in the order of their labels, the one without disease first."""
    patient_pattern: str | None = None
    """For image-folder: regular expression whose first group is the patient."""
    mask: str | None = None
    """lesion or lungs, where a collection has both."""
    mask_threshold: float | None = None
    """For nifti-folder: stored values from here on are inside the mask."""
    table: str | None = None
    """CSV beside the collection: patient, series or folder, and hospital, scanner, label, split."""
    pictures: str | None = None
    """For sars-cov-2-ct: CSV beside the collection with columns picture and patient."""
    leave_out: tuple[str, ...] | None = None
    """Patients to leave out, under the names that the preflight and the index give them."""
    series: str | None = None
    """Of a single folder that holds several series, which one: its number in the list or the end of its UID. With
    --collection, of a patient with several: largest or every."""
    side: int | None = None
    """Pixels along each side of a stored picture."""
    fit: str | None = None
    """How a picture becomes a square: stretch, crop or pad."""
    levels: str | None = None
    """standardized (every stored picture has the same mean and spread of grey) or kept."""


COLLECTION_OPTIONS = (
    *("hospitals", "count", "alpha", "seed", "split", "labels", "classes", "patient_pattern", "mask"),
    *("mask_threshold", "table", "pictures", "leave_out", "series", "side", "fit", "levels"),
)


def run(words: list[str]) -> int:
    """Brings scans into standard volumes, or looks at them first."""
    given = parse(IngestCommand, words, prog="capsfl ingest")
    from capsfl.ct.collections import CollectionConfig
    from capsfl.ct.ingest import ingest as ingest_scans
    from capsfl.ct.normalize import VolumeConfig

    options = {name: value for name in COLLECTION_OPTIONS if (value := getattr(given, name)) is not None}
    series = options.pop("series", None) if given.collection is None else None
    if options and given.collection is None:
        raise ValueError(f"{next(iter(options))}: only with --collection; say what the folder is")
    collection = None
    if given.collection is not None:
        chosen: Any = {"name": given.collection, **options}
        try:
            collection = CollectionConfig(**chosen)
        except ValidationError as error:
            raise ValueError(explain(error, "capsfl ingest").replace(": name = ", ": collection = ")) from None
    console = Console()
    if given.check:
        return _check_scans(given, collection, console)
    if given.out is None:
        raise ValueError("out: missing; name a folder for the volumes, or add --check to look at the scans only")
    report = ingest_scans(
        given.source,
        given.out,
        config=VolumeConfig(preset=given.preset, window=given.window),
        collection=collection,
        reader=given.reader,
        root=given.root,
        series=series,
        processes=given.processes,
        on_error=given.on_error,
    )
    console.print(f"{report.written} written, {report.kept} kept, {len(report.failed)} left out: {given.out}")
    for note in report.notes:
        console.print(f"  note: {note}", soft_wrap=True, highlight=False, markup=False)
    for name, fault in report.failed:
        console.print(f"  {name}: {fault}", soft_wrap=True, highlight=False, markup=False)
    return 3 if report.failed else 0


def _check_scans(given: IngestCommand, collection: Any, console: Console) -> int:
    """Looks at every series and writes a table and a page for each hospital."""
    from capsfl.ct.preflight import check
    from capsfl.report.preflight import print_preflight, write_preflight

    found = check(given.source, collection=collection, reader=given.reader, root=given.root, processes=given.processes)
    pages = write_preflight(found, Path(given.out or "preflight"))
    print_preflight(found, console)
    for page in pages:
        console.print(f"page: {page}", soft_wrap=True, highlight=False)
    return 3 if any(not finding.accepted for finding in found.findings) else 0
