"""Stored volumes as earlier versions of the format left them."""

import json
from pathlib import Path

import numpy as np

from capsfl.ct.normalize import StandardVolume
from capsfl.ct.zarr_group import checksum


def as_format(place: Path, version: int, volume: StandardVolume) -> None:
    """Gives a stored volume the record of a version before 4: its number, and the checksum over every byte."""
    marker = place / "zarr.json"
    group = json.loads(marker.read_text())
    masks = {f"masks/{name}": mask.astype(np.uint8) for name, mask in volume.masks.items()}
    total = checksum({"hu": volume.hu, "valid": volume.valid, "affine": volume.affine, **masks})
    group["attributes"]["capsfl"] |= {"version": version, "checksum": total}
    marker.write_text(json.dumps(group))
