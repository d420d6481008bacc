"""What of a place a study can answer for: scans where it was trained on volumes, pictures where on pictures."""

from collections.abc import Sequence
from pathlib import Path

from capsfl.ct.errors import NoSeries, ScanError, WrongFormat
from capsfl.ct.picture_files import is_picture
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.walk import walk
from capsfl.predict.pictures import NO_HOUNSFIELD, FoundPictures, find_pictures
from capsfl.predict.scans import Found, find_scans


def find_sources(
    kinds: Sequence[str],
    place: Path,
    *,
    out: Path | None = None,
    series: str | None = None,
    reader: ReaderConfig | None = None,
) -> list[Found | FoundPictures]:
    """Lists what there is to predict, what cannot be used included, each under a name of its own.

    Args:
        kinds: what the study was trained on, `volume` or `pictures` or both.
        place: see `find_scans` and `find_pictures`.
        out: folder of results, in which nothing is looked for.
        series: the only series wanted, see `find_scans`.
        reader: what the reader may mend.

    Raises:
        ScanError: nothing there is of a kind that the study knows; the message says what it was trained on.
    """
    if "volume" not in kinds:
        return [*find_pictures(place, out=out)]
    found: list[Found | FoundPictures] = []
    fault: ScanError | None = None
    alone = is_picture(place) and not place.is_dir()
    if not alone:
        try:
            found += find_scans(place, series=series, reader=reader, out=out)
        except NoSeries as error:
            fault = error
    pictured = alone or (place.is_dir() and any(is_picture(path) for path in walk(place).files))
    if "pictures" in kinds and pictured and series is None:
        # What is no picture was listed as a scan, or skipped as none.
        return found + [one for one in find_pictures(place, out=out) if one.files]
    if pictured and not found:
        raise WrongFormat(
            place,
            f"pictures, {NO_HOUNSFIELD}, and the study was trained on volumes in Hounsfield units",
            "give the CT series themselves, or name a study that was trained on pictures",
        )
    if fault is not None:
        raise fault
    return found


def check_options(kinds: Sequence[str], formats: Sequence[str] | None, **options: object) -> None:
    """Refuses options that say something about scans where a study was trained on pictures alone.

    Raises:
        ValueError: names the first of them.
    """
    if "volume" in kinds:
        return
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} = {value}: of CT scans, and the study was trained on pictures; leave it out")
    if formats is not None and "png" not in formats:
        raise ValueError(
            f"formats = {' '.join(formats)}: of CT scans, and the study was trained on pictures; leave it out"
        )
