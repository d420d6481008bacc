"""One scan from its files to its place on disk, and whether what stands there is still it."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from capsfl.ct import pictures, volumes
from capsfl.ct.collections import CollectionConfig, ScanEntry, is_nifti
from capsfl.ct.dicom import read_dicom
from capsfl.ct.errors import ScanError
from capsfl.ct.lungs import body_mask
from capsfl.ct.nifti import read_nifti, read_nifti_mask
from capsfl.ct.normalize import StandardVolume, VolumeConfig, standardize
from capsfl.ct.output import below
from capsfl.ct.picture_files import read_picture_set
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.scan import Scan
from capsfl.ct.walk import walk
from capsfl.ct.zarr_group import Place

logger = logging.getLogger(__name__)

MASK = "truth"
"""Name of the manifest's mask within a stored volume."""
BODY = "body"
"""Name of the body's mask, found by `lungs.body_mask`, within a stored volume."""


@dataclass(frozen=True)
class IngestConfig:
    """What decides how a scan is stored."""

    volumes: VolumeConfig
    pictures: CollectionConfig | None = None
    """Of it, `side`, `fit` and `levels` alone; its defaults when None."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    """What the readers may mend."""

    def of(self, entry: ScanEntry) -> dict[str, Any]:
        """The settings that an entry's stored form depends on, as JSON."""
        if entry.kind == "volume":
            # The window is applied when a volume is read, so changing it needs no new volumes.
            return self.volumes.model_dump(mode="json", exclude={"window"}) | self.reader.model_dump(mode="json")
        return self.square

    @property
    def square(self) -> dict[str, Any]:
        """How a picture becomes a square."""
        pictures = self.pictures or CollectionConfig(name="manifest")
        return {"side": pictures.side, "fit": pictures.fit, "levels": pictures.levels}


def ingest_scan(entry: ScanEntry, out: Place, config: IngestConfig, salt: bytes) -> Literal[True] | ScanError:
    """Read, standardize and store one scan or picture set; a fault of the scan is returned, one of the disk raised.

    Raises:
        StorageError: the disk is read-only or full; nothing half-written is left.
    """
    try:
        key = source_key(entry, config)
        stored = (
            read_picture_set(entry.files, **config.square, boxes=entry.boxes)
            if entry.kind == "pictures"
            else _standard_volume(entry, config, salt)
        )
    except ScanError as error:
        return error
    except OSError as error:
        return ScanError(entry.image, f"cannot be read ({error.strerror or error})", "check the files")
    attributes = {
        "patient": entry.patient,
        "hospital": entry.hospital,
        "scanner": entry.scanner,
        "label": entry.label,
        "source_key": key,
    }
    path = stored_path(out, entry)
    if isinstance(stored, pictures.PictureSet):
        pictures.write_pictures(path, stored, attributes={**attributes, "config": config.square})
    else:
        attributes["config"] = config.volumes.model_dump(mode="json")
        attributes["reader"] = config.reader.model_dump(mode="json")
        volumes.write_volume(path, stored, attributes=attributes)
    return True


def read_scan(entry: ScanEntry, reader: ReaderConfig, salt: bytes | None) -> Scan:
    """Read the scan of an entry that is a volume.

    Raises:
        ScanError: see `read_dicom` and `read_nifti`.
    """
    if is_nifti(entry.image):
        return read_nifti(entry.image, config=reader)
    return read_dicom(entry.files or entry.image, series=entry.series, config=reader, salt=salt)


def is_current(entry: ScanEntry, out: Place, config: IngestConfig) -> bool:
    """Whether the stored form of an entry stands, made from the same files by the same settings."""
    path = stored_path(out, entry)
    try:
        if entry.kind == "pictures":
            stored = pictures.read_picture_attributes(path)
        else:
            stored = volumes.read_attributes(path)
        return stored.get("source_key") == source_key(entry, config)
    except (ScanError, OSError):  # nothing stored, or a source that cannot be read is named when it is ingested
        return False


def source_key(entry: ScanEntry, config: IngestConfig) -> str:
    """Digest of everything a stored scan depends on; files count by name, size and time of change.

    Raises:
        Unreadable: a folder of the scan is locked or a link leads nowhere.
    """
    files: list[tuple[str, int, int]] = []
    for path in (entry.image, entry.mask):
        if path is None:
            continue
        if path == entry.image and entry.files:
            members = list(entry.files)
        elif path.is_dir():
            tree = walk(path)
            if tree.unreadable:
                raise tree.unreadable[0][1]
            members = tree.files
        else:
            members = [path]
        for member in members:
            status = member.stat()
            files.append((str(member.relative_to(path)), status.st_size, status.st_mtime_ns))
    row = {name: value for name, value in asdict(entry).items() if name not in ("image", "mask", "split", "files")}
    layout = [pictures.FORMAT, pictures.VERSION] if entry.kind == "pictures" else [volumes.FORMAT, volumes.VERSION]
    record = {"format": layout, "files": files, "row": row, "config": config.of(entry)}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def stored_path(out: Place, entry: ScanEntry) -> Place:
    """Where an entry is stored."""
    return below(out, entry.hospital, f"{entry.patient}.zarr")


def _standard_volume(entry: ScanEntry, config: IngestConfig, salt: bytes) -> StandardVolume:
    scan = read_scan(entry, config.reader, salt)
    masks = {}
    if entry.mask is not None:
        threshold = entry.mask_threshold
        masks[MASK] = read_nifti_mask(entry.mask, like=scan, threshold=threshold, config=config.reader)
    volume = standardize(scan, config=config.volumes, masks=masks)
    if volume.cropped_lung_fraction > 0:
        logger.warning(
            "%s/%s: %.1f %% of the lungs lies outside the standard extent",
            entry.hospital,
            entry.patient,
            100 * volume.cropped_lung_fraction,
        )
    del scan  # memory is what limits the number of workers
    return replace(volume, masks={**volume.masks, BODY: body_mask(volume.hu, volume.spacing_mm)})
