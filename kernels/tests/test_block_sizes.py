"""The table of measured block sizes: what is recorded is chosen, and a bad file does no harm."""

import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import pytest
from capsfl_kernels import block_sizes

SHAPE = (128, 1152, 8, 10, 16)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the test's own for the user's table; nothing is there yet."""
    path = tmp_path / "tables" / "block_sizes.json"
    monkeypatch.setenv("CAPSFL_BLOCK_SIZES", str(path))
    monkeypatch.setattr(block_sizes, "BUILT_IN", ())
    return path


def choose(shape=SHAPE, operator="dynamic_routing", implementation="streamed", dtype=jnp.float32, default=7):
    return block_sizes.choose(operator, implementation, shape=shape, dtype=dtype, default=default)


def record(block_size, shape=SHAPE, operator="dynamic_routing", implementation="streamed", dtype=jnp.float32):
    return block_sizes.record(operator, implementation, shape=shape, dtype=dtype, block_size=block_size)


def test_what_is_recorded_is_chosen_and_the_last_word_counts(table: Path):
    assert choose() == 7
    assert record(96) == table
    assert choose() == 96
    record(64)
    record(32, shape=(1, 1152, 8, 10, 16))
    assert choose() == 64
    assert choose(shape=(1, 1152, 8, 10, 16)) == 32
    assert len(json.loads(table.read_text())["entries"]) == 2


@pytest.mark.usefixtures("table")
def test_the_nearest_entry_counts_up_to_a_factor_of_two():
    record(96)
    record(48, shape=(128, 1600, 8, 10, 16))
    assert choose(shape=(128, 1200, 8, 10, 16)) == 96
    assert choose(shape=(128, 1500, 8, 10, 16)) == 48
    assert choose(shape=(64, 1152, 8, 20, 16)) == 96
    assert choose(shape=(63, 1152, 8, 10, 16)) == 7
    assert choose(shape=(128, 1152, 8, 10)) == 7


@pytest.mark.usefixtures("table")
def test_an_entry_speaks_only_for_its_operator_implementation_dtype_and_device(monkeypatch: pytest.MonkeyPatch):
    record(96)
    assert choose(operator="route_votes") == 7
    assert choose(implementation="reference") == 7
    assert choose(dtype=jnp.bfloat16) == 7
    monkeypatch.setattr(block_sizes, "_device_kind", lambda: "NVIDIA H200")
    assert choose() == 7


def test_the_users_table_goes_before_the_built_in_one(table: Path, monkeypatch: pytest.MonkeyPatch):
    here = block_sizes._device_kind()
    entry = block_sizes.Entry("dynamic_routing", "streamed", here, "float32", SHAPE, 11)
    monkeypatch.setattr(block_sizes, "BUILT_IN", (entry,))
    assert choose() == 11
    record(96, shape=(100, 1152, 8, 10, 16))
    assert choose() == 96


GOOD = {
    "operator": "dynamic_routing",
    "implementation": "streamed",
    "device": "cpu",
    "dtype": "float32",
    "shape": list(SHAPE),
    "block_size": 96,
}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "it is not JSON"),
        ('{"capsfl_block_sizes": 1, "entr', "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ('{"version": 3, "blocks": []}', "no table of block sizes of version 1"),
        ('{"capsfl_block_sizes": 2, "entries": []}', "no table of block sizes of version 1"),
        ('{"capsfl_block_sizes": 1}', "its entries are not a list"),
        ({**GOOD, "block_size": 0}, "block_size=0 must be an integer from 1"),
        ({**GOOD, "block_size": 1 << 40}, "must be an integer from 1"),
        ({**GOOD, "block_size": True}, "block_size=True"),
        ({**GOOD, "block_size": 9.5}, "block_size=9.5"),
        ({**GOOD, "shape": [128, -1]}, "must be a list of positive integers"),
        ({**GOOD, "shape": []}, "must be a list of positive integers"),
        ({**GOOD, "dtype": 32}, "dtype=32 must be a word"),
        ({"operator": "dynamic_routing"}, "an entry needs exactly"),
    ],
)
def test_a_bad_file_is_ignored_with_one_warning_and_never_overwritten(table: Path, content: object, reason: str):
    text = content if isinstance(content, str) else json.dumps({"capsfl_block_sizes": 1, "entries": [GOOD, content]})
    table.parent.mkdir()
    table.write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [choose(), choose(), choose()] == [7, 7, 7]
    (warning,) = caught
    assert str(table) in str(warning.message)
    assert reason in str(warning.message)
    assert "--tune" in str(warning.message)
    with pytest.raises(ValueError, match="move it away, or set CAPSFL_BLOCK_SIZES"):
        record(64)
    assert table.read_text() == text


def test_a_directory_in_its_place_is_ignored_with_a_warning(table: Path):
    table.mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored: Is a directory"):
        assert choose() == 7


def test_an_interrupted_write_leaves_the_old_table_and_no_litter(table: Path, monkeypatch: pytest.MonkeyPatch):
    record(96)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_sizes.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        record(64)
    assert choose() == 96
    assert [path.name for path in table.parent.iterdir()] == [table.name]


@pytest.mark.parametrize(("block_size", "shape"), [(0, SHAPE), (-4, SHAPE), (1 << 30, SHAPE), (8, (0, 2))])
def test_nonsense_is_not_recorded(table: Path, block_size: int, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="must be"):
        record(block_size, shape=shape)
    assert not table.exists()


def test_the_place_of_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CAPSFL_BLOCK_SIZES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert block_sizes.table_path() == tmp_path / "capsfl" / "block_sizes.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert block_sizes.table_path() == tmp_path / "home" / ".cache" / "capsfl" / "block_sizes.json"


def test_the_built_in_table_is_well_formed():
    for entry in block_sizes.BUILT_IN:
        assert block_sizes._check(entry._asdict()) == entry
