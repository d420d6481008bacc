"""Digits as capsule papers use them: moved, placed, distorted, learned, and refused where a file does not fit."""

import gzip
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsfl.bench import digits, mnist, page
from capsfl.bench.digit_training import DigitTrainer, DigitTrainingConfig
from capsfl.bench.plain_digits import PlainDigits, count_weights, plain_of_size
from capsfl.config import ConfigError
from capsfl.models.efficient_capsnet import EfficientCapsNet, EfficientCapsNetConfig

SMALL = """
seeds = [3]
goal_percent = 50.0
[model]
name = "efficient_capsnet"
image_size = 28
classes = 10
conv_channels = [8, 8, 8, 16]
conv_strides = [2, 1, 1, 2]
decoder = [16]
[training]
epochs = 2
batch_size = 30
learning_rate = 0.01
"""


def bars(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images that tell their class by the height of a bright bar."""
    labels = np.arange(count) % 10
    images = np.random.default_rng(seed).uniform(0, 0.2, (count, 28, 28, 1)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[4 + 2 * label : 6 + 2 * label, 6:22] = 1.0
    return images, labels.astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mnist")
    for part, count in (("train", 600), ("t10k", 100)):
        images, labels = bars(count, seed=count)
        for name, array in (("images-idx3", images[..., 0] * 255), ("labels-idx1", labels)):
            head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            (place / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
    return place


def test_a_shift_moves_by_at_most_so_many_pixels_and_loses_no_inner_pixel():
    images = jnp.zeros((200, 28, 28, 1)).at[:, 10, 14].set(1.0)
    moved = np.asarray(digits.shift(images, key=jax.random.key(1), pixels=2))
    rows, columns = np.argwhere(moved[..., 0])[:, 1:].T
    assert len(rows) == 200
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 12, 12, 16)
    assert digits.shift(images, key=jax.random.key(1), pixels=0) is images


def test_a_digit_is_placed_wholly_inside_the_canvas_and_everywhere_on_it():
    images = jnp.ones((300, 28, 28, 1))
    placed = np.asarray(digits.place(images, key=jax.random.key(2)))
    assert placed.shape == (300, 40, 40, 1)
    np.testing.assert_array_equal(placed.sum(axis=(1, 2, 3)), 28 * 28)
    corners = {tuple(np.argwhere(image[..., 0])[0]) for image in placed}
    assert {row for row, _ in corners} == set(range(13)) == {column for _, column in corners}


def test_distortion_keeps_the_middle_and_the_mass_within_its_ranges():
    rows, columns = np.indices((40, 40)) - 19.5
    disc = jnp.broadcast_to(jnp.asarray(rows**2 + columns**2 < 64, jnp.float32)[None, ..., None], (50, 40, 40, 1))
    seen = np.asarray(jax.jit(lambda images: digits.distort(images, key=jax.random.key(3)))(disc))
    mass = seen.sum(axis=(1, 2, 3)) / float(disc[0].sum())
    assert 0.8**2 - 0.05 < mass.min() < 0.9 < 1.1 < mass.max() < 1.2**2 + 0.05
    middle = np.tensordot(seen[..., 0], rows, axes=((1, 2), (0, 1))) / seen.sum(axis=(1, 2, 3))
    np.testing.assert_allclose(middle, 0, atol=0.05)


def test_a_distorted_digit_keeps_all_its_ink_and_stays_where_it_was_placed():
    """Bars up to the edge of the image, which a distortion about the canvas's middle pushes over its rim."""
    generator = np.random.default_rng(0)
    images = np.zeros((64, 28, 28, 1), np.float32)
    for image in images:
        row, column = generator.integers(0, 24, 2)
        image[row : row + 4, 2:26], image[2:26, column : column + 4] = 1.0, 1.0
    keys = {"key": jax.random.key(2), "distortion_key": jax.random.key(3)}
    placed = np.asarray(jax.jit(digits.place_distorted)(jnp.asarray(images), **keys))
    room = ((0, 0), (12, 12), (12, 12), (0, 0))
    distort = jax.jit(digits.distort)
    whole = np.asarray(distort(jnp.pad(jnp.asarray(images), room), key=keys["distortion_key"]))
    np.testing.assert_allclose(placed.sum(axis=(1, 2, 3)), whole.sum(axis=(1, 2, 3)), rtol=1e-5)
    still = digits.place(jnp.asarray(images), key=keys["key"])
    before, moved = (
        np.stack([np.argwhere(image[..., 0] > 0).mean(axis=0) for image in each])
        for each in (np.asarray(still), placed)
    )
    assert np.abs(moved - before).mean() < 1.5
    cut = np.asarray(distort(still, key=keys["distortion_key"]))
    lost = 1 - cut.sum(axis=(1, 2, 3)) / whole.sum(axis=(1, 2, 3))
    assert lost.max() > 0.05, "the test's digits would lose ink the other way"


def test_training_learns_and_repeats_bit_for_bit():
    images, labels = bars(240)
    config = DigitTrainingConfig(epochs=3, batch_size=24, learning_rate=1e-2, shift_pixels=0)

    trainer = DigitTrainer(PlainDigits(8, rngs=nnx.Rngs(0)), config, images, labels)

    def run() -> tuple[float, float]:
        learned, loss = trainer.begin(), float("nan")
        for number in range(config.epochs):
            learned, loss = trainer.epoch(learned, key=jax.random.key(number))
        return loss, trainer.error(learned, *bars(50, seed=9))

    loss, error = run()
    assert loss < 0.85 * np.log(10)
    assert run() == (loss, error)


def test_the_plain_network_has_as_many_weights_as_the_capsules():
    config = EfficientCapsNetConfig.mnist().model_copy(update={"image_size": digits.CANVAS})
    weights = count_weights(nnx.eval_shape(lambda: EfficientCapsNet(config, rngs=nnx.Rngs(0))))
    plain = count_weights(nnx.eval_shape(lambda: plain_of_size(weights, rngs=nnx.Rngs(0))))
    assert abs(plain - weights) < 0.005 * weights
    large = nnx.eval_shape(lambda: plain_of_size(11_227_904, rngs=nnx.Rngs(0)))
    assert abs(count_weights(large) - 11_227_904) < 0.005 * 11_227_904
    assert large.hidden.out_features < 1500, "convolutions take the weights, not one hidden layer"
    assert count_weights(
        nnx.eval_shape(lambda: EfficientCapsNet(EfficientCapsNetConfig.mnist(), rngs=nnx.Rngs(0)))
    ) == (161_824)


@pytest.mark.parametrize("name", ["mnist_efficient", "mnist_capsnet"])
def test_the_shipped_configurations_are_those_of_the_papers(name, request):
    config = mnist.load_mnist_config(request.config.rootpath / "configs" / f"{name}.toml")
    assert config.seeds == (0, 1, 2)
    assert config.training.shift_pixels == 2
    assert config.model.model_dump()["reconstruction"] is True


@pytest.mark.journey
def test_the_benchmark_reports_the_error_of_the_last_epoch(folder, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    said: list[str] = []
    result = mnist.measure(mnist.MnistBench(path, folder, epochs=3), say=said.append)
    assert result["config"]["training"]["epochs"] == 3
    (row,) = result["rows"]
    assert len(row["loss"]) == 3
    assert row["loss"][1] < row["loss"][0]
    assert result["summary"] == {"efficient_capsnet": {"test": row["error_percent"]["test"]}}
    (table,) = page.tables(result)
    assert "goal 50 %" in table.title
    assert table.rows[0][3] == f"{row['error_percent']['test']:.2f}"
    assert said[-1].startswith("mnist, efficient_capsnet, seed 3: error test")


def test_no_epochs_are_refused(folder, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    with pytest.raises(ValueError, match="epochs = 0: must be at least 1"):
        mnist.measure(mnist.MnistBench(path, folder, epochs=0), say=print)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("classes = 10", "classes = 3", "model.classes = 3: MNIST has 10"),
        ("image_size = 28", "image_size = 32", "model.image_size = 32: training.canvas is 28; make them equal"),
        ("epochs = 2", "epochs = 0", "training.epochs"),
        ('"efficient_capsnet"', '"resnet"', "unknown network"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(tmp_path, old, new, message):
    path = tmp_path / "wrong.toml"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        mnist.load_mnist_config(path)
