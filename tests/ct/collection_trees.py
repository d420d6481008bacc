"""Collections in miniatures of their documented layouts."""

import nibabel
import numpy as np
from PIL import Image

from capsfl.ct.collections import CollectionConfig
from capsfl.ct.ingest import ingest
from capsfl.ct.normalize import VolumeConfig

AFFINE = np.diag([-3.0, -3.0, 5.0, 1.0])


def config_of(name, **fields):
    """The configuration of a collection, with small pictures."""
    return CollectionConfig(name=name, side=16, **fields)


def write_picture(path, *, size=(20, 24), value=100):
    """A picture of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def write_nifti(path, values=None, *, fill=-900):
    """A small volume, of one value where none are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((12, 12, 6), fill, np.int16) if values is None else values
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), path)
    return path


def run(source, out, config, **arguments):
    """Ingests a collection; its volumes show no lungs to centre on."""
    return ingest(
        source, out, config=VolumeConfig(center="volume"), collection=config, processes=1, progress=False, **arguments
    )


def facts(collection):
    """Patient to (hospital, label, split, pictures)."""
    return {entry.patient: (entry.hospital, entry.label, entry.split, len(entry.files)) for entry in collection.entries}


def write_mosmed(root):
    """MosMedData: six studies in folders of their severity, one of them with a mask."""
    for number, severity in enumerate((0, 1, 1, 2, 3, 4), start=1):
        write_nifti(root / "studies" / f"CT-{severity}" / f"study_{number:04d}.nii.gz")
    mask = np.zeros((12, 12, 6), np.uint8)
    mask[3:9, 3:9, 1:5] = 1
    write_nifti(root / "masks" / "study_0002_mask.nii.gz", mask)
    return root


def write_cc19(root):
    """CC-19 as pictures: five patients' slices, and the list of them."""
    rows = []
    for split, kind, stem, slices in (
        ("train", "positive", "p1", 3),
        ("train", "positive", "p10", 2),
        ("train", "negative", "n1", 2),
        ("test", "positive", "p2", 2),
        ("test", "negative", "n2", 1),
    ):
        rows.append(f"{split},{kind},{stem},{slices}")
        for index in range(slices):
            write_picture(root / "data" / split / kind / f"{stem}-{index:04d}.jpg")
    (root / "data_file.csv").write_text("\n".join(rows) + "\n")
    return root
