"""What there is to predict: the series and NIfTI volumes of a folder tree, each under a name of its own."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from capsfl.ct.dicom import read_series, scan_folder
from capsfl.ct.errors import NoSeries, ScanError, SeveralSeries
from capsfl.ct.nifti import read_nifti
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.scan import Scan
from capsfl.ct.series import FolderListing, Series
from capsfl.ct.slices import DicomSlice
from capsfl.ct.walk import walk
from capsfl.predict.naming import Names, beside, digest_of_files

NIFTI = (".nii", ".nii.gz")
LISTED = 20
"""Series that a refusal lists."""


@dataclass(frozen=True)
class Found:
    """One series to predict: its name in the results, its file or its slices, or why it cannot be read."""

    name: str
    path: Path
    series: Series | None = None
    refusal: ScanError | None = None
    reader: ReaderConfig | None = None

    def read(self) -> tuple[Scan, Sequence[DicomSlice]]:
        """The scan, and the DICOM slices that it was read from.

        Raises:
            ScanError: the series cannot be used; the message names it.
        """
        if self.refusal is not None:
            raise self.refusal
        if self.series is None:
            return read_nifti(self.path, config=self.reader), ()
        return read_series(self.series), self.series.slices

    def digest(self) -> str:
        """SHA-256 by which two scans of one name are told apart.

        Of the Series Instance UID and of what the reader splits a series by, or of a NIfTI file: whoever holds the scan
        can compute it, nobody else can tell whose it is.
        """
        if self.series is None or not self.series.uid:
            return digest_of_files((self.path,) if self.series is None else self.series.files)
        one = self.series
        stack = one.slices[0].stack if one.slices else ""
        told = (one.uid, stack, one.plane, one.rows, one.columns, *(f"{size:.3f}" for size in one.pixel_spacing_mm))
        return hashlib.sha256("\n".join(map(str, told)).encode()).hexdigest()


def find_scans(
    place: Path, *, series: str | None = None, reader: ReaderConfig | None = None, out: Path | None = None
) -> Iterator[Found]:
    """Lists what there is to predict, what cannot be used included, each under a name of its own.

    Args:
        place: a DICOM file or series, a NIfTI file, or a folder tree of many of them.
        series: number or SeriesInstanceUID, or its ending, of the only series wanted.
        reader: what the reader may mend.
        out: folder of results, whose masks are no volumes to predict.

    Raises:
        NoSeries: nothing there is a CT series or a NIfTI file.
        SeveralSeries: `series` does not name one of them.
    """
    names = Names(place)
    if place.name.endswith(NIFTI):
        yield Found(names.of(place), place, reader=reader)
        return
    listing = scan_folder(place, config=reader, progress=True)
    if series is not None:
        one = _chosen(listing, series)
        yield Found(names.of(_home(one)), _home(one), one, one.refusal)
        return
    volumes = [path for path in walk(place).files if path.name.endswith(NIFTI)] if place.is_dir() else []
    volumes = beside(out, place, volumes)
    # What a series is refused for needs no second line.
    known = {id(one.refusal) for one in listing.series}
    broken = [(path, error) for path, error in listing.broken if id(error) not in known]
    if not (listing.series or volumes or broken):
        raise NoSeries(place, f"no CT series (found {listing.found()})", "give a folder of axial CT slices")
    for one in listing.series:
        yield Found(names.of(_home(one)), _home(one), one, one.refusal)
    for path in volumes:
        yield Found(names.of(path), path, reader=reader)
    for path, error in broken:
        yield Found(names.of(path), path, refusal=error)


def _chosen(listing: FolderListing, series: str) -> Series:
    chosen = [s for s in listing.series if str(s.number) == series or (len(series) > 3 and s.uid.endswith(series))]
    if len(chosen) != 1:
        listed = " | ".join(map(str, listing.series[:LISTED]))
        fault = f"--series {series} matches {len(chosen)} of {len(listing.series)} series"
        raise SeveralSeries(listing.place, fault, f"choose one of: {listed}")
    return chosen[0]


def _home(series: Series) -> Path:
    return series.files[0].parent
