"""Which pictures there are to predict, and whose each is."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsfl.ct.errors import NoSeries, ScanError, WrongFormat
from capsfl.ct.picture_files import is_picture, is_remark, read_picture_set
from capsfl.ct.pictures import PictureSet
from capsfl.ct.walk import walk
from capsfl.predict.naming import Names, beside, digest_of_files

NO_HOUNSFIELD = "whose grey values are not Hounsfield units"


@dataclass(frozen=True)
class FoundPictures:
    """The pictures of one patient: their name in the results, or why there is no result."""

    name: str
    files: tuple[Path, ...] = ()
    refusal: ScanError | None = None

    def read(self, square: dict[str, Any]) -> PictureSet:
        """The pictures as the importer of a study prepared its own, see `read_picture_set`.

        Raises:
            ScanError: one of them cannot be read; the message names it.
        """
        if self.refusal is not None:
            raise self.refusal
        return read_picture_set(self.files, **square)

    def digest(self) -> str:
        """SHA-256 by which the pictures of two patients of one name are told apart."""
        return digest_of_files(self.files)


def find_pictures(place: Path, *, out: Path | None = None) -> Iterator[FoundPictures]:
    """Lists the patients whose pictures lie at a place, what cannot be used included.

    A picture is a patient, whether it is named itself or lies in the folder that is named. Below that folder the
    pictures of one folder are one patient's: nobody is pooled with anybody unless somebody put them into a folder.

    Args:
        place: a picture, or a folder tree of them.
        out: folder of results, whose pictures are none to predict.

    Raises:
        NoSeries: there is no such file or folder.
        WrongFormat: no picture lies there.
    """
    if not place.exists():
        raise NoSeries(place, "no such file or folder", "check the path")
    if not place.is_dir():
        if not is_picture(place):
            raise _no_picture(place, "not a picture")
        yield FoundPictures(Names(place.parent).of(place.with_suffix("")), (place,))
        return
    names = Names(place)
    tree = walk(place)
    folders: dict[Path, list[Path]] = {}
    others: dict[Path, list[Path]] = {}
    for path in beside(out, place, tree.files):
        if is_picture(path):
            folders.setdefault(path.parent, []).append(path)
        elif not is_remark(path):
            others.setdefault(path.parent, []).append(path)
    if not folders and not tree.unreadable:
        count = sum(map(len, others.values()))
        raise _no_picture(place, f"no picture among {count} files" if count else "no picture in the folder")
    for path in folders.pop(place, ()):
        yield FoundPictures(names.of(path.with_suffix("")), (path,))
    for folder, files in folders.items():
        yield FoundPictures(names.of(folder), tuple(files))
    for folder, files in others.items():
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        error = _no_picture(files[0], f"not a picture{more}")
        yield FoundPictures(names.of(folder / "other files"), refusal=error)
    for path, error in tree.unreadable:
        yield FoundPictures(names.of(path), refusal=error)


def _no_picture(place: Path, fault: str) -> WrongFormat:
    return WrongFormat(
        place,
        f"{fault}, and the study was trained on pictures, {NO_HOUNSFIELD}, so it cannot judge CT scans",
        "give PNG, JPEG or BMP pictures, or name a study that was trained on volumes",
    )
