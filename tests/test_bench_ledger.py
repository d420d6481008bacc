"""`capsfl bench ledger --quick` through the command line."""

import json

import pytest

from capsfl.bench import page
from capsfl.cli import main


def test_a_quick_run_measures_both_ways_to_decide_on_every_curve(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "ledger", "--quick", "--out", str(tmp_path), "--json"])
    assert not end.value.code
    result = json.loads(capsys.readouterr().out)
    assert {row["decided"] for row in result["rows"]} == {"owner", "members"}
    for row in result["rows"]:
        assert row["signatures"] == (1 if row["decided"] == "owner" else 34)
        assert row["verified_per_cpu_minute"] > 0
        assert row["path_bytes"] <= 320
    table, overhead = page.tables(result)
    assert len(table.rows) == len(result["rows"])
    assert [row["decided"] for row in result["overhead"]] == ["owner", "members"]
    assert len(overhead.rows) == 2
    assert all(row["record_wall_s"] > 0 for row in result["overhead"])
    assert "## The ledger" in page.write_page(tmp_path)
