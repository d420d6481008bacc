"""Problems of a sweep: MNIST read as it is, dealt out as described; images of our own the same every time."""

import gzip
import struct
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfl.ct.phantom import PhantomConfig
from capsfl.learning.classification import ClassificationConfig, Classifier, make_classification_task
from capsfl.models.capsnet import CapsNetConfig
from capsfl.sweeps.classifier import ImageModelConfig, make_image_task
from capsfl.sweeps.mnist import FILES, read_mnist, split_over_hospitals
from capsfl.sweeps.patients import score_patients
from capsfl.sweeps.problems import MnistProblem, PhantomProblem, SyntheticProblem, build


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def digits(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """40 training and 20 test images, the training images gzipped."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    write_idx(tmp_path / f"{FILES['train'][0]}.gz", images)
    write_idx(tmp_path / FILES["train"][1], labels)
    write_idx(tmp_path / FILES["test"][0], images[:20])
    write_idx(tmp_path / FILES["test"][1], labels[:20])
    return tmp_path, images, labels


def test_mnist_is_read_as_it_was_written(digits):
    folder, images, labels = digits
    train, test = read_mnist(folder)
    np.testing.assert_allclose(train["image"][..., 0], images / 255, atol=1e-6)
    np.testing.assert_array_equal(train["label"], labels)
    assert test["image"].shape == (20, 28, 28, 1)
    pooled, _ = read_mnist(folder, pool=4)
    assert pooled["image"].shape == (40, 7, 7, 1)
    assert pooled["image"][3, 1, 2, 0] == pytest.approx(images[3, 4:8, 8:12].mean() / 255, abs=1e-6)


def test_real_mnist_has_its_known_first_digits(shared_data):
    if not (shared_data / "mnist").is_dir():
        pytest.skip("no MNIST there")
    train, validation = read_mnist(shared_data / "mnist", scored_on="validation")
    assert train["label"][:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert (len(train["label"]), len(validation["label"])) == (50_000, 10_000)
    assert train["image"].mean() == pytest.approx(0.1307, abs=5e-4)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / FILES["train"][1]).unlink(), "no train-labels-idx1-ubyte or train-labels"),
        (lambda folder: (folder / FILES["train"][1]).write_bytes(b"\0\0\x08\1\0\0\0\x09abc"), "not an IDX file"),
        (lambda folder: (folder / FILES["train"][1]).write_bytes(b""), "not an IDX file"),
        (lambda folder: (folder / f"{FILES['train'][0]}.gz").write_bytes(b"no gzip"), "unreadable"),
        (lambda folder: write_idx(folder / FILES["train"][1], np.zeros(3, np.uint8)), "40 images and 3 labels"),
    ],
)
def test_a_damaged_file_is_named(digits, break_it, message):
    folder = digits[0]
    break_it(folder)
    with pytest.raises(ValueError, match=message) as refusal:
        read_mnist(folder)
    assert str(folder) in str(refusal.value)


@given(
    hospitals=st.integers(1, 20),
    shards=st.none() | st.integers(1, 4),
    rows=st.integers(80, 200),
    seed=st.integers(0, 99),
)
def test_every_image_goes_to_one_hospital(hospitals, shards, rows, seed):
    labels = np.random.default_rng(seed).integers(0, 10, rows)
    shares = split_over_hospitals(labels, hospitals=hospitals, shards=shards, most=None, seed=seed)
    assert len(shares) == hospitals
    assert sorted(np.concatenate(shares).tolist()) == list(range(rows))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= (shards or 1)


def test_shards_hold_few_digits_and_an_even_deal_holds_many():
    labels = np.repeat(np.arange(10), 100)
    kinds = {}
    for name, shards in (("shards", 2), ("iid", None)):
        shares = split_over_hospitals(labels, hospitals=50, shards=shards, most=None, seed=1)
        kinds[name] = np.mean([len(set(labels[share])) for share in shares])
    assert kinds["shards"] <= 2
    assert kinds["iid"] > 7


def test_more_shards_than_images_are_refused():
    with pytest.raises(ValueError, match=r"problem.hospitals = 30: 60 shards of 50 images"):
        split_over_hospitals(np.zeros(50, int), hospitals=30, shards=2, most=None, seed=0)


def test_mnist_over_hospitals_is_a_problem(digits):
    folder = digits[0]
    built = build(MnistProblem(folder=str(folder), hospitals=4, records=7, scored_on="test"))
    assert len(built.hospitals) == 4
    assert built.hospitals.counts.max() <= 7
    assert built.held_out.names == ("test",)
    assert built.utility == "accuracy"


def test_synthetic_images_are_the_same_for_every_study_and_weights_are_the_seed_s():
    problem = SyntheticProblem(hospitals=3, records=4, side=6)
    other = problem.model_copy(update={"model": ImageModelConfig(hidden=(5,))})
    built = build(problem)
    np.testing.assert_array_equal(built.hospitals.records["image"], build(other).hospitals.records["image"])

    def flat(seed: int) -> np.ndarray:
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(built.make_task(seed).parameters)])

    np.testing.assert_array_equal(flat(1), flat(1))
    assert not np.array_equal(flat(1), flat(2))


@pytest.mark.parametrize("kind", ["mlp", "cnn", "capsnet"])
@pytest.mark.parametrize("side", [8, 28])
def test_every_network_scores_images_of_every_size(kind, side):
    task = make_image_task(ImageModelConfig(kind=kind, capsules=2), side=side, classes=10, seed=0)
    batch = {"image": np.ones((3, side, side, 1), np.float32), "label": np.arange(3, dtype=np.int32)}
    shapes = jax.eval_shape(task.scores, task.parameters, batch, np.ones(3, np.float32))
    assert shapes.keys() == {"accuracy", "held_out_loss"}
    assert jax.eval_shape(task.loss, task.parameters, batch).shape == ()


def test_a_network_that_pools_the_image_away_is_refused():
    with pytest.raises(ValueError, match=r"problem.model.channels = \[1, 2, 3, 4\]: pools the image away"):
        make_image_task(ImageModelConfig(kind="cnn", channels=(1, 2, 3, 4)), side=8, classes=2, seed=0)


def test_a_patient_is_decided_once_as_a_study_decides_it():
    """From the images that are there, by the mean over those that look least like class 0."""
    config = ClassificationConfig(image_size=32, top_slices=2, classes=3, model=CapsNetConfig.ct(image_size=32))
    make = partial(make_classification_task, config)
    task = score_patients(lambda seed: make(seed=seed), top=config.top_slices)(3)
    generator = np.random.default_rng(4)
    weights = jax.tree.map(lambda leaf: leaf + 0.3 * generator.normal(size=leaf.shape), task.parameters)
    bright = np.repeat(generator.uniform(size=(6, 4, 4, 1, 1)), 8, axis=2)
    images = (bright * generator.uniform(size=(6, 4, 32, 32, 1))).astype(np.float32)
    counts, labels = np.array([4, 1, 3, 2, 4, 3]), np.array([0, 1, 2, 1, 2, 0], np.int32)
    here = np.arange(4) < counts[:, None]
    batch = {"image": images * here[..., None, None, None], "here": here, "label": labels}
    found = jax.jit(task.scores)(weights, batch, np.array([1, 1, 1, 1, 1, 0], np.float32))
    classifier = Classifier(make(seed=3), config)
    own = [classifier.probabilities(weights, image[:count]) for image, count in zip(images, counts, strict=True)]
    called = np.array([classifier.judge(probabilities).argmax() for probabilities in own])
    np.testing.assert_allclose(found["accuracy"], (np.sum((called == labels)[:5]), 5))
    np.testing.assert_allclose(found["specificity"], (float(called[0] == 0), 1))
    np.testing.assert_allclose(found["sensitivity_2"], (np.sum(called[[2, 4]] == 2), 2))
    assert len(set(called)) > 1, "or the test tells nothing"


def test_phantom_hospitals_join_one_after_another_and_are_scored_on_the_same_patients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for part in ("pool", "phantom.hospitals"):  # a process costs more to start than four phantoms to draw
        monkeypatch.setattr(f"capsfl.ct.{part}.count_cores", lambda: 1)
    cohort = PhantomConfig(hospitals=2, patients=8, matrix=128, positives_fraction=0.5, slice_thickness_mm=10, seed=11)
    looking = ClassificationConfig(image_size=32, slices_per_scan=2, model=CapsNetConfig.ct(image_size=32))
    problem = PhantomProblem(folder=str(tmp_path), phantom=cohort, field=(32, 64, 64), classification=looking)
    both, first = build(problem), build(problem.model_copy(update={"hospitals": 1}))
    assert (both.hospitals.names, first.hospitals.names) == (("hospital-A", "hospital-B"), ("hospital-A",))
    np.testing.assert_array_equal(first.hospitals.records["image"], both.hospitals.records["image"][:1])
    assert first.hospitals.counts.tolist() == both.hospitals.counts[:1].tolist()
    assert first.held_out is both.held_out
    assert first.held_out.names == both.hospitals.names, "whoever does not take part is scored too"
    assert int(both.hospitals.counts.sum()) // 2 + int(both.held_out.counts.sum()) == 8, "slices train, patients test"
    assert (both.utility, both.scored) == ("accuracy", "patients")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.dcm")}
    assert len(written) > 8
    with pytest.raises(ValueError, match=r"problem.test_fraction = 0.8: only 1 of 2 hospitals have a patient left"):
        build(problem.model_copy(update={"test_fraction": 0.8}))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.dcm")} == written, "drawn once"
    with pytest.raises(ValueError, match=r"problem.hospitals = 3: the phantom has 2; name fewer"):
        build(problem.model_copy(update={"hospitals": 3}))
