"""From a folder and the collection's name to entries with hospitals and splits."""

from dataclasses import replace
from pathlib import Path

from capsfl.ct.collections.cc19 import read_cc19
from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.covid19_ct_seg import read_covid19_ct_seg
from capsfl.ct.collections.covid_ct import read_covid_ct
from capsfl.ct.collections.covidx_ct import read_covidx_ct
from capsfl.ct.collections.dicom_folder import read_dicom_folder
from capsfl.ct.collections.entries import Collection
from capsfl.ct.collections.hospitals import (
    assign_hospitals,
    draw_splits,
    keep_apart,
    keep_together,
    refuse_doubles,
    unite_splits,
)
from capsfl.ct.collections.image_folder import read_image_folder
from capsfl.ct.collections.manifest import read_manifest
from capsfl.ct.collections.mosmed import read_mosmed
from capsfl.ct.collections.nifti_folder import read_nifti_folder
from capsfl.ct.collections.sars_cov2_ct import read_sars_cov2_ct
from capsfl.ct.collections.table import Found, apply_table
from capsfl.ct.errors import ManifestError, WrongLayout
from capsfl.ct.reader import ReaderConfig


def read_collection(
    source: Path,
    config: CollectionConfig,
    *,
    root: Path | None = None,
    reader: ReaderConfig | None = None,
    all_series: bool = False,
) -> Collection:
    """List the scans of a collection, deal its patients to hospitals, and split them.

    Nothing but file names, tables and headers is read. Two calls give the same result. All scans of a person go to one
    hospital and one split, see `keep_together`; a split that is left to the study draws persons too.

    Args:
        source: the collection's top folder; for `manifest` the CSV or its folder.
        config: the layout and the rules.
        root: folder that a manifest's paths are relative to; the manifest's folder when None.
        reader: what the DICOM reader may mend.
        all_series: for a table of what there is: of a DICOM tree list also what is left out otherwise, small series
            and a patient's further ones, and leave every scan in the hospital that it was found in.

    Raises:
        WrongLayout: the folder is not this collection: one line says what was expected and what was found.
        ManifestError: a table is unusable, two scans have one name, or the rules cannot be met.
    """
    source = Path(source)
    if not source.exists():
        raise WrongLayout(source, "no such file or folder", "check the path")
    collection = _import(source, config, root, reader, all_series)
    collection = _without(collection, config.leave_out)
    entries = collection.entries
    if config.split != "official" and not collection.test_only:
        entries = tuple(replace(entry, split=None) for entry in entries)
    entries, parted = unite_splits(entries)
    entries = assign_hospitals(entries, config)
    together, moved = keep_together(entries)
    entries = entries if all_series else together
    if config.split == "drawn" and collection.test_only:
        raise ManifestError(
            'collection.split = "drawn": the collection names no patients, so no split of it is by patient; name them '
            "in a CSV and give its name as collection.pictures"
        )
    if config.split == "drawn":
        entries = draw_splits(entries, config)
    refuse_doubles(entries)
    return replace(collection, entries=entries, notes=(*collection.notes, *parted, *moved))


def _without(collection: Collection, patients: tuple[str, ...]) -> Collection:
    """The collection without some patients."""
    if not patients:
        return collection
    entries = tuple(e for e in collection.entries if not {e.patient, e.person} & set(patients))
    left = {name for e in collection.entries for name in (e.patient, e.person)}
    if unknown := [name for name in patients if name not in left]:
        raise ManifestError(f"collection.leave_out = {unknown[0]!r}: no such patient here; mend the name")
    if not entries:
        raise ManifestError("collection.leave_out: nobody is left; name fewer patients")
    note = f"{len(collection.entries) - len(entries)} entries are left out as asked"
    return replace(collection, entries=entries, notes=(*collection.notes, note))


def _import(
    source: Path, config: CollectionConfig, root: Path | None, reader: ReaderConfig | None, all_series: bool
) -> Collection:
    match config.name:
        case "manifest":
            manifest = source / "manifest.csv" if source.is_dir() else source
            return _with_table(_found(Collection(read_manifest(manifest, root))), manifest.parent, config)
        case "covid-ct":
            return _with_table(_found(read_covid_ct(source, config)), source, config)
        case "covidx-ct":
            return _with_table(_found(read_covidx_ct(source, config)), source, config)
        case "mosmed":
            return _with_table(_found(read_mosmed(source, config)), source, config)
        case "covid-19-ct-seg":
            return _with_table(_found(read_covid19_ct_seg(source, config)), source, config)
        case "sars-cov-2-ct":
            collection = _with_table(read_sars_cov2_ct(source, config), source, config)
            return replace(collection, test_only=not config.pictures)
        case "cc-19":
            return _with_table(read_cc19(source, config, reader, all_series=all_series), source, config)
        case "nifti-folder":
            return _with_table(read_nifti_folder(source, config), source, config)
        case "image-folder":
            return _with_table(read_image_folder(source, config), source, config)
        case "dicom-folder":
            return _with_table(read_dicom_folder(source, config, reader, all_series=all_series), source, config)


Listing = tuple[tuple[Found, ...], tuple[str, ...], list[str]]
"""Entries, classes and notes."""


def _found(collection: Collection) -> Listing:
    """A collection whose patients a table calls as their folders are called."""
    return tuple(Found(entry, entry.patient) for entry in collection.entries), collection.classes, [*collection.notes]


def _with_table(listing: Listing, folder: Path, config: CollectionConfig) -> Collection:
    found, classes, notes = listing
    origins = tuple(item.entry.hospital for item in found)
    if config.table:
        found, remarks = apply_table(found, folder / config.table)
        notes = [*notes, *remarks]
    entries = tuple(item.entry for item in found)
    # A person's scans will share a hospital, so their names have to differ there.
    together, _ = keep_together(entries)
    named = keep_apart(together, origins, config)
    entries = tuple(replace(one, patient=other.patient) for one, other in zip(entries, named, strict=True))
    return Collection(entries, classes, tuple(notes))
