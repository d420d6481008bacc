"""Stored hospitals: the same records as in memory, read one by one, refused by name where they are damaged."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federate import federate
from capsfl.federated.federation import Federation, RoundsConfig
from capsfl.federated.hospitals import Hospitals, stack_hospitals
from capsfl.federated.local import LocalConfig
from capsfl.federated.store_format import HospitalStoreError
from capsfl.federated.store_writer import rewrite_hospitals_store, write_hospitals_store
from capsfl.federated.stored import open_hospitals_store
from capsfl.privacy.plan import PrivacyConfig


def draw(counts: list[int], size: int = 3) -> dict:
    generator = np.random.default_rng(0)
    return {
        f"h{i}": {
            "image": generator.normal(size=(n, size, size)).astype(np.float32),
            "labels": (generator.integers(0, 9, n).astype(np.int32), generator.random((n, 2)) < 0.5),
            "half": [generator.normal(size=n).astype(np.float16)],
        }
        for i, n in enumerate(counts)
    }


COUNTS = [3, 1, 5, 2, 4]
RECORDS = draw(COUNTS)


@pytest.fixture(params=[False, True], ids=["one file a hospital", "shared files"])
def store(request, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr("capsfl.federated.store_writer.SHARD_HOSPITALS", 2 if request.param else 1)
    write_hospitals_store(tmp_path / "store", RECORDS.items(), capacity=5)
    return tmp_path / "store"


def same(found, hospitals: Hospitals, indices) -> None:
    expected = jax.tree.map(lambda leaf: leaf[indices], hospitals.records)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == np.ascontiguousarray(other).tobytes()


def test_a_cohort_is_the_same_as_from_memory_bit_for_bit(store):
    hospitals, memory = open_hospitals_store(store), stack_hospitals(RECORDS)
    assert tuple(hospitals.names) == memory.names
    assert (len(hospitals), hospitals.capacity) == (5, 5)
    assert hospitals.counts.dtype == memory.counts.dtype
    assert hospitals.counts.tolist() == COUNTS
    for indices in (np.array([4, 0, 2]), np.arange(5), np.array([1, 1])):
        same(hospitals.take(indices), memory, indices)


@pytest.mark.parametrize("ahead", [[2, 0], [2, 1], [0, 2]])
def test_reading_ahead_changes_no_record(store, ahead):
    hospitals = open_hospitals_store(store)
    hospitals.prefetch(np.array(ahead))
    same(hospitals.take(np.array([2, 0])), stack_hospitals(RECORDS), [2, 0])


def test_what_was_read_ahead_is_used_once_and_another_cohort_drops_it(store):
    hospitals = open_hospitals_store(store)
    indices = np.array([4, 3])
    hospitals.prefetch(indices)
    for _, futures in hospitals._ahead.pending:  # pyright: ignore[reportOptionalMemberAccess]
        for future in futures:
            future.result()
    for path in store.glob("leaves/*/c/**/*"):
        path.unlink() if path.is_file() else None
    same(hospitals.take(indices), stack_hospitals(RECORDS), indices)
    hospitals = open_hospitals_store(store)
    hospitals.prefetch(indices)
    with pytest.raises(HospitalStoreError, match="'h0'"):
        hospitals.take(np.array([0]))
    assert hospitals._ahead is None


def test_slots_that_are_masked_are_not_read(store):
    hospitals = open_hospitals_store(store)
    (store / "leaves/0/c/0/0").unlink()  # the first file of `half` holds h0
    found = hospitals.take(np.array([4, 0]), np.array([True, False]))
    assert np.array_equal(found["image"][0, :4], RECORDS["h4"]["image"])
    assert not any(leaf[1].any() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("harm", ["missing", "damaged", "cut short"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_harmed_hospital_is_named_and_the_others_are_read(store, harm, ahead):
    path = store / "leaves/1/c/2/0/0/0"
    if not path.exists():  # one file a hospital has as many files as hospitals
        pytest.fail(f"{path} is not there")
    shared = not (store / "leaves/1/c/4/0/0/0").exists()
    if harm == "missing":
        path.unlink()
    elif harm == "damaged":
        content = bytearray(path.read_bytes())
        content[10] ^= 255
        path.write_bytes(content)
    else:
        path.write_bytes(path.read_bytes()[:7])
    hospitals = open_hospitals_store(store)
    name, index = ("h4", 4) if shared else ("h2", 2)
    if ahead:
        hospitals.prefetch(np.array([0, index]))
    with pytest.raises(HospitalStoreError, match=f"hospital '{name}' cannot be read"):
        hospitals.take(np.array([0, index]))
    same(hospitals.take(np.array([0, 1])), stack_hospitals(RECORDS), [0, 1])


def test_reading_one_hospital_does_not_read_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("capsfl.federated.store_writer.SHARD_HOSPITALS", 1)
    write_hospitals_store(tmp_path, RECORDS.items(), capacity=5)
    hospitals = open_hospitals_store(tmp_path)
    for path in tmp_path.glob("leaves/*/c/*"):
        if path.name != "3":
            for file in [path] if path.is_file() else [x for x in path.rglob("*") if x.is_file()]:
                file.unlink()
    same(hospitals.take(np.array([3])), stack_hospitals(RECORDS), [3])


def test_a_killed_write_does_not_open_and_can_be_repeated(tmp_path):
    def killed():
        yield from list(RECORDS.items())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_hospitals_store(tmp_path / "s", killed(), capacity=5)
    with pytest.raises(HospitalStoreError, match="its writing was not finished"):
        open_hospitals_store(tmp_path / "s")
    write_hospitals_store(tmp_path / "s", RECORDS.items(), capacity=5)
    same(open_hospitals_store(tmp_path / "s").take(np.arange(5)), stack_hospitals(RECORDS), np.arange(5))


def test_nothing_that_is_there_is_overwritten(tmp_path, store):
    with pytest.raises(HospitalStoreError, match="holds a finished store"):
        write_hospitals_store(store, RECORDS.items(), capacity=5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "scan").write_text("precious")
    with pytest.raises(HospitalStoreError, match="not empty"):
        write_hospitals_store(tmp_path / "other", RECORDS.items(), capacity=5)
    assert (tmp_path / "other" / "scan").read_text() == "precious"


def test_a_place_that_cannot_be_written_and_hospitals_that_cannot_be_drawn_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HospitalStoreError, match="file/s/"):
        write_hospitals_store(tmp_path / "file" / "s", RECORDS.items(), capacity=5)

    def unreadable():
        yield from list(RECORDS.items())[:1]
        raise FileNotFoundError("scan 7")

    with pytest.raises(FileNotFoundError, match="scan 7"):
        write_hospitals_store(tmp_path / "s", unreadable(), capacity=5)


def test_a_record_that_was_changed_is_refused(store):
    path = store / "hospitals.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "counts": [5] * 5}))
    with pytest.raises(HospitalStoreError, match="does not match its checksum"):
        open_hospitals_store(store)
    path.write_text("{")
    with pytest.raises(HospitalStoreError, match="is damaged"):
        open_hospitals_store(store)


def test_an_array_that_does_not_fit_is_refused(store):
    path = store / "leaves/1/zarr.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps({**metadata, "shape": [4, 5, 3, 3]}))
    with pytest.raises(HospitalStoreError, match=r"leaves/1: float32 \(4, 5, 3, 3\), expected"):
        open_hospitals_store(store)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "hospitals: none given"),
        ([("a", {"x": np.ones((6, 1))})], r"hospitals\['a'\]: 6 records; must be 1 to capacity = 5"),
        ([("a", {"x": np.ones((0, 1))})], r"hospitals\['a'\]: 0 records"),
        ([("a", {"x": np.ones(2), "y": np.ones(3)})], r"hospitals\['a'\]: arrays disagree"),
        ([("a", {"x": np.ones(2)}), ("b", {"x": np.ones((2, 3))})], r"hospitals\['b'\]: .* differ from the first"),
        ([("a", {"x": np.ones(2)}), ("b", {"x": np.ones(2, int)})], r"hospitals\['b'\]: .* differ from the first"),
        ([("a", {"x": np.ones(2)}), ("a", {"x": np.ones(2)})], r"hospitals\['a'\]: given twice"),
    ],
)
def test_hospitals_that_do_not_fit_are_refused_by_name(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        write_hospitals_store(tmp_path, records, capacity=5)
    with pytest.raises(HospitalStoreError):
        open_hospitals_store(tmp_path)


@pytest.mark.parametrize("place", ["url", "spec"])
def test_any_key_value_store_serves(tmp_path, place):
    where = f"file://{tmp_path}/s/" if place == "url" else {"driver": "file", "path": f"{tmp_path}/s"}
    write_hospitals_store(where, RECORDS.items(), capacity=5)
    same(open_hospitals_store(where).take(np.array([2])), stack_hospitals(RECORDS), [2])


def test_an_index_outside_is_refused(store):
    with pytest.raises(IndexError, match="hospital 5 of 5"):
        open_hospitals_store(store).take(np.array([0, 5]))


def test_many_hospitals_open_at_once(tmp_path):
    one = {"x": np.ones((1, 1), np.float32)}
    write_hospitals_store(tmp_path, ((f"h{i}", one) for i in range(100_000)), capacity=1)
    start = time.process_time()
    hospitals = open_hospitals_store(tmp_path)
    assert time.process_time() - start < 1
    assert len(hospitals) == 100_000
    assert hospitals.take(np.array([99_999]))["x"].tolist() == [[[1.0]]]


ROUNDS = RoundsConfig(rounds=4, local=LocalConfig(optimizer="sgd", learning_rate=0.1, batch_size=8))
PRIVACY = PrivacyConfig(sampler="poisson", cohort=2, clip_norm=1.0, noise_multiplier=0.5)


def test_training_from_disk_is_bit_identical_and_reads_each_cohort_while_the_last_one_trains(
    tmp_path, task, net, records, monkeypatch
):
    write_hospitals_store(tmp_path, records.items(), capacity=max(len(rows["y"]) for rows in records.values()))
    stored = open_hospitals_store(tmp_path)
    log: list[tuple[str, bytes]] = []
    take, prefetch, start = stored.take, stored.prefetch, stored._start

    def logged(name, method):
        def call(indices, mask=None):
            log.append((name, indices[mask].tobytes()))
            return method(indices, mask)

        return call

    for name, method in (("take", take), ("prefetch", prefetch), ("_start", start)):
        monkeypatch.setattr(stored, name, logged(name, method))
    # L = 2, so that slots are laid out by size and one stays empty.
    devices = DevicesConfig(chunk=2)
    memory = Federation(task, stack_hospitals(records), config=ROUNDS, privacy=PRIVACY, devices=devices, seed=5)
    disk = Federation(task, stored, config=ROUNDS, privacy=PRIVACY, devices=devices, seed=5)
    one, other = memory.init(), disk.init()
    cohorts = []
    for _ in range(ROUNDS.rounds):
        one, expected = memory.step(one)
        other, report = disk.step(other)
        assert report == expected
        cohorts.append(report.cohort)
        for leaf, same in zip(jax.tree.leaves(other), jax.tree.leaves(one), strict=True):
            assert np.asarray(leaf).tobytes() == np.asarray(same).tobytes()
    assert len(set(cohorts)) == len(cohorts) > 1, "another seed: the cohorts must differ for the log to show anything"
    names = [name for name, _ in log]
    assert names == ["take", "_start", *["prefetch", "_start", "take"] * (ROUNDS.rounds - 1)], "read once, one ahead"
    assert all(log[place] == ("take", what) for place, (name, what) in enumerate(log, 2) if name == "prefetch")


def test_anybodys_hospitals_can_lie_in_a_store(tmp_path, net, records):
    def squared_error(model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).mean()

    hospitals = stack_hospitals(records)
    (tmp_path / "left by an earlier start").mkdir()
    rewrite_hospitals_store(tmp_path, hospitals)
    stored = open_hospitals_store(tmp_path)
    assert (tuple(stored.names), stored.capacity) == (hospitals.names, hospitals.capacity)
    result = federate(net, squared_error, stored, rounds=RoundsConfig(rounds=1, local=ROUNDS.local), privacy=PRIVACY)
    assert len(result.history) == 1


def test_control_variates_of_stored_hospitals_are_refused_by_name(store, task):
    stored = open_hospitals_store(store)
    with pytest.raises(ValueError, match="scaffold = true: keeps a copy of the model for each of 5 hospitals"):
        Federation(task, stored, config=RoundsConfig(scaffold=True), privacy=PrivacyConfig(clip_norm=1.0))
