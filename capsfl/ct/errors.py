"""What can be wrong with a scan: one class per fault, one line per message."""

from pathlib import Path


def printable(text: object) -> str:
    """The text on one line: what would break a line, a terminal or an encoding is written as an escape."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in str(text))


class ScanError(ValueError):
    """A scan that cannot be used; the message is one line: the place, the fault, the remedy."""

    def __init__(self, place: Path | str, fault: str, remedy: str) -> None:
        """Keep the three parts apart, so that a table can show them and a process can pickle them."""
        parts = (printable(place), printable(fault), remedy)
        super().__init__(*parts)
        self.place, self.fault, self.remedy = parts

    def __str__(self) -> str:
        return f"{self.place}: {self.fault}; {self.remedy}"


class Unreadable(ScanError):
    """A file or folder cannot be opened: permissions, a broken link, a failing disk, a special file."""


class NotDicom(ScanError):
    """A file is not DICOM although it stands where DICOM is expected."""


class CorruptFile(ScanError):
    """A file is truncated or its contents contradict its header."""


class WrongFormat(ScanError):
    """A file is readable, but it is not a volume in Hounsfield units."""


class NoSeries(ScanError):
    """A folder holds no CT series; the message counts what was found instead."""


class SeveralSeries(ScanError):
    """A folder holds more than one CT series and none was chosen."""


class TooFewSlices(ScanError):
    """A series has fewer slices than a volume needs."""


class MissingSlices(ScanError):
    """A series has gaps that are whole multiples of its slice spacing."""


class DuplicatePositions(ScanError):
    """Two slices stand at one position and differ."""


class InconsistentGeometry(ScanError):
    """Positions, orientations or grids contradict each other."""


class MissingRescale(ScanError):
    """Stored values cannot be turned into Hounsfield units."""


class UnsupportedMultiframe(ScanError):
    """A multi-frame object whose functional groups do not say where each frame lies."""


class UnsupportedColor(ScanError):
    """Pixels carry colour, so they cannot be Hounsfield units."""


class MissingDecoder(ScanError):
    """The pixels are compressed and no installed package decodes them."""


class TooLarge(ScanError):
    """A scan declares, or unpacks to, more than the reader takes; nothing of it was read."""


class CorruptVolume(ScanError):
    """A stored standard volume is incomplete, damaged or of another format version."""


class WrongLayout(ScanError):
    """A folder does not have the layout of the collection that it is said to hold."""


class GantryTilt(ScanError):
    """The slices are sheared against their normal because the gantry was tilted."""

    def __init__(self, place: Path | str, angle_degrees: float) -> None:
        """Name the angle that the positions imply, whatever the header's tilt tag says."""
        super().__init__(
            place,
            f"gantry tilt of {angle_degrees:.1f} degrees between slice normal and table travel",
            "set reader.allow_tilt_correction to shear it straight, or use an untilted series",
        )
        self.angle_degrees = angle_degrees
        self.args = (self.place, angle_degrees)


class ManifestError(ValueError):
    """A manifest is unusable; the message names file:line, column, value and remedy."""


class StorageError(OSError):
    """A result could not be written; the message names the path and the remedy."""
