"""A stored scan as a patient: the window of its scanner, and what the field leaves out of its mask."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from capsfl.ct.errors import ScanError
from capsfl.ct.index import IndexEntry
from capsfl.ct.ingest import BODY, MASK
from capsfl.ct.normalize import StandardVolume, VolumeConfig
from capsfl.ct.scan import ScanSource, as_rows
from capsfl.ct.volumes import write_volume
from capsfl.learning.patients import load_patient

AFFINE = np.array([[0, 0, 2.5, 0], [0, 2.5, 0, 0], [4, 0, 0, 0], [0, 0, 0, 1.0]])
SIDE = 16
PER_SCANNER = VolumeConfig(window="scanner")


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> IndexEntry:
    """A volume whose mask marks two voxels in the middle and three at the edge."""
    place: Path = tmp_path_factory.mktemp("volumes") / "p.zarr"
    hu = np.zeros((SIDE, SIDE, SIDE), np.int16)
    truth = np.zeros(hu.shape, bool)
    truth[8, 8, 7:9] = truth[0, 0, 3:6] = True
    source = ScanSource("dicom", "p", (SIDE, SIDE, SIDE), as_rows(AFFINE), (0, 1, 2), (False, False, False))
    masks = {MASK: truth, BODY: hu == 0}
    write_volume(place, StandardVolume(hu, hu == 0, masks, AFFINE, AFFINE, hu.shape, source), attributes={})
    return IndexEntry("p", "A", "C6", 1, None, place)


def test_the_window_is_that_of_the_scanner_where_the_study_says_so(entry: IndexEntry):
    assert load_patient(entry, field=None, volumes=PER_SCANNER).window_hu == (-500.0, 1500.0)
    assert load_patient(entry, field=None, volumes=VolumeConfig()).window_hu == (-600.0, 1600.0)
    assert load_patient(entry, field=None).window_hu == (-600.0, 1600.0)


@pytest.mark.parametrize("scanner", ["X9", None])
def test_a_scanner_without_a_window_is_refused_naming_the_patient(entry: IndexEntry, scanner: str | None):
    unknown = replace(entry, scanner=scanner)
    with pytest.raises(ScanError, match=r'A/p, .*scanner.*: Table II has no window .* train with window = "fixed"'):
        load_patient(unknown, field=None, volumes=PER_SCANNER)
    load_patient(unknown, field=None)


def test_what_the_field_cuts_off_a_mask_is_counted(entry: IndexEntry):
    assert load_patient(entry, field=None).truth_outside == 0
    cut = load_patient(entry, field=(8, 8, 8))
    assert cut.truth is not None
    assert (cut.truth.sum(), cut.truth_outside) == (2, 3)
