"""A damaged series is refused by name, or the scan is what its files say: 2,000 seeded mutations of a real series."""

import os
import shutil
from collections import Counter

import pytest
from dicom_mutations import BASES, run

MUTATIONS = 2000
PART = 200
TORTURE = "CAPSFL_TORTURE" in os.environ


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_damage_is_named_or_does_no_harm(tmp_path):
    came: Counter[str] = Counter()
    seeds = range(0, MUTATIONS, MUTATIONS // 60 + 1)
    run(seeds, tmp_path, report=lambda seed, what, verdict: came.update([verdict]))
    assert came.total() >= 55
    assert came["accepted"] >= 3  # or the damage is too coarse to show whether the reader takes too much
    assert not any("several lines" in verdict for verdict in came)
    assert len(came) >= 4


@pytest.mark.torture
@pytest.mark.skipif(not TORTURE, reason="minutes of processor time: make torture")
@pytest.mark.parametrize("start", range(0, MUTATIONS, PART))
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_two_thousand_damages_are_named_or_do_no_harm(tmp_path, start):
    assert PART % len(BASES)  # every part meets every encoding in turn
    run(range(start, start + PART), tmp_path)


@pytest.mark.torture
@pytest.mark.skipif(not TORTURE, reason="a minute of processor time: make torture")
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_damage_to_a_series_in_jpeg_lossless_is_named_or_does_no_harm(tmp_path, shared_data):
    """A hospital's own encoding, which needs a decoder in C and has no encoder here."""
    files = sorted((shared_data / "ricord1a-covid-ct-jpegll").iterdir())[20:24]

    def write(folder):
        for file in files:
            shutil.copy(file, folder)

    run(range(300), tmp_path, bases={"JPEG lossless": write})
