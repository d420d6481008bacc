"""`capsfl bench ingest`: a quick run through the command line, and peers that are absent, fail or err."""

import json
import sys

import pytest

from capsfl.bench import ingest, page
from capsfl.bench.ingest import Contestant, IngestBench
from capsfl.bench.peer_process import PeerError
from capsfl.cli import main


def test_a_quick_run_measures_ours_and_skips_whom_it_does_not_find(tmp_path, capsys, monkeypatch):
    nobody = tmp_path / "python"
    nobody.write_text('#!/bin/sh\necho \'{"error": "nothing is installed here"}\'\n')
    nobody.chmod(0o755)
    monkeypatch.setenv("CAPSFL_PEER_PYTHON", str(nobody))
    monkeypatch.setattr(ingest, "count_cores", lambda: 1)
    with pytest.raises(SystemExit) as end:
        main(["bench", "ingest", "--quick", "--out", str(tmp_path / "results"), "--json"])
    captured = capsys.readouterr()
    assert not end.value.code, captured.err
    result = json.loads(captured.out)
    (row,) = result["rows"]
    assert (row["implementation"], row["matrix"]) == ("capsfl", 128)
    assert row["slices"] > 20
    assert row["wall_s"]["median"] > 0
    assert row["process_cpu_s"]["median"] > 0
    assert -900 < row["mean_hu"] < -300, "lungs, heart and spine"
    if row["peak_bytes"] is not None:
        assert row["peak_bytes"] > 256**3, "a mask of the volume at the least"
    assert {skip["implementation"] for skip in result["skipped"]} == set(ingest.CONTESTANTS) - {"capsfl"}
    assert {skip["reason"] for skip in result["skipped"]} == {"nothing is installed here"}
    first, *_, last = page.tables(result)
    assert first.title.startswith("phantom 10 mm: ")
    assert last.title == "Skipped"
    assert "## DICOM series to standard volumes" in page.write_page(tmp_path / "results")


def test_ratios_are_over_ours_on_the_same_series():
    def row(series: str, name: str, wall: float, peak: int) -> dict:
        return {
            "series": series,
            "implementation": name,
            "wall_s": {"median": wall},
            "process_cpu_s": {"median": 2 * wall},
            "peak_bytes": peak,
        }

    rows = [row("a", "capsfl", 1.0, 100), row("a", "MONAI", 3.0, 250), row("b", "capsfl", 2.0, 100)]
    (found,) = ingest._against_ours(rows)
    assert found == {"series": "a", "implementation": "MONAI", "wall": 3.0, "process_cpu": 3.0, "peak": 2.5}


def test_a_library_that_is_absent_or_fails_is_told_in_a_line(tmp_path):
    with pytest.raises(PeerError, match="No such file"):
        Contestant("MONAI", str(tmp_path / "python"))
    (tmp_path / "series").mkdir()
    with Contestant("capsfl", sys.executable) as ours:
        ours.start(tmp_path / "series", tmp_path / "out", {"center": [0, 0, 0]})
        with pytest.raises(PeerError, match=r"NoSeries: .*empty"):
            ours.answer()


def test_a_series_that_is_not_there_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"series = .*absent: no such folder; give folders"):
        ingest.measure(IngestBench(series=(tmp_path / "absent",)), say=print)
