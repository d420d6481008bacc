"""The zoo: the sizes of Keras, its logits after copying weights, its weight files, and refusals in one line."""

import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError

from capsfl.models.keras_weights import KerasWeightsError, read_keras_weights
from capsfl.models.zoo import NETWORKS, Network, build_network, parse_network
from capsfl.models.zoo.imagenet import load_imagenet
from capsfl.models.zoo.layers import (
    BatchNorm,
    Conv,
    DepthwiseConv,
    SeparableConv,
    depthwise_convolve,
    max_pool_3x3,
    mean_pool_3x3,
)

TORTURE = os.environ.get("CAPSFL_TORTURE") == "1"

# Parameters at three channels without a classifier, running statistics included. All but AlexNet's are those of
# `keras.applications` (checked against it below); AlexNet's 2,469,696 is torchvision's 61,100,840 less its three
# fully connected layers.
PUBLISHED = {
    "vgg16": 14_714_688,
    "vgg19": 20_024_384,
    "alexnet": 2_469_696,
    "xception": 20_861_480,
    "resnet50": 23_587_712,
    "resnet50v2": 23_564_800,
    "resnet152v2": 58_331_648,
    "inceptionv3": 21_802_784,
    "mobilenet": 3_228_864,
    "mobilenetv2": 2_257_984,
    "densenet121": 7_037_504,
    "densenet169": 12_642_880,
    "densenet201": 18_321_984,
}

SMALLEST = dict.fromkeys(NETWORKS, 32) | {"alexnet": 63, "xception": 71, "inceptionv3": 75}

KERAS = {
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "xception": "Xception",
    "resnet50": "ResNet50",
    "resnet50v2": "ResNet50V2",
    "resnet152v2": "ResNet152V2",
    "inceptionv3": "InceptionV3",
    "mobilenet": "MobileNet",
    "mobilenetv2": "MobileNetV2",
    "densenet121": "DenseNet121",
    "densenet169": "DenseNet169",
    "densenet201": "DenseNet201",
}

MODULES = {
    "resnet50": "resnet50",
    "resnet50v2": "resnet_v2",
    "resnet152v2": "resnet_v2",
    "inceptionv3": "inception_v3",
    "mobilenetv2": "mobilenet_v2",
    "densenet121": "densenet",
    "densenet169": "densenet",
    "densenet201": "densenet",
}
"""The module of `keras.applications` whose `preprocess_input` a network was trained with."""

DEEPEST = ("resnet152v2", "densenet169", "densenet201")
"""They share their code with the others of their families, and take seconds to trace."""


def _config(name: str, **fields: Any) -> Any:
    return parse_network({"name": name, "image_size": SMALLEST[name]} | fields)


def _count(module: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, (nnx.Param, nnx.BatchStat))))


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """Keras on JAX, whose set-up is left as it is; Keras writes its own where the test run may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        patch.setenv("KERAS_BACKEND", "jax")
        before = dict(jax.config.values)
        module = pytest.importorskip("keras", reason="needs Keras; pip install 'capsfl[test]'")
        assert dict(jax.config.values) == before
    return module


def _build_keras(keras: Any, name: str) -> Any:
    """A network of Keras with the head of ours, nothing in it at its first value."""
    side = SMALLEST[name]
    keras.utils.set_random_seed(0)
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build = getattr(keras.applications, KERAS[name])
        body = build(include_top=False, weights=None, input_shape=(side, side, 3))
        hidden = keras.layers.Dense(256, activation="relu", name="hidden")
        outputs = keras.layers.Dense(2, name="logits")(hidden(keras.layers.GlobalAveragePooling2D()(body.output)))
        model = keras.Model(body.input, outputs)
    generator = np.random.default_rng(0)
    for variable in body.trainable_variables:
        # Keras starts kernels so small that behind tens of layers nothing of the image is left to compare.
        kernel = variable.path.endswith("kernel")
        variable.assign(1.5 * variable if kernel else variable + generator.normal(scale=0.1, size=variable.shape))
    for layer in body.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # what follows leaves the statistics of its batch
    pixels = generator.uniform(-1, 1, (4, side, side, 3)).astype(np.float32)
    with jax.numpy_rank_promotion("allow"):
        gather = jax.jit(lambda *state: body.stateless_call(*state, pixels, training=True)[1])
        trained, gathered = (
            [v.value for v in group] for group in (body.trainable_variables, body.non_trainable_variables)
        )
        for variable, value in zip(body.non_trainable_variables, gather(trained, gathered), strict=True):
            variable.assign(value)
    return body, model


def _save(body: Any, path: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body.save_weights(path)


@nnx.jit
def _logits(network: Any, images: jax.Array) -> jax.Array:
    return network(images)


def _compare(keras: Any, name: str, folder: Any) -> None:
    """Counts and logits of one network in Keras, through a file of weights, and here."""
    body, model = _build_keras(keras, name)
    assert body.count_params() == PUBLISHED[name]
    path = folder / f"{name}.weights.h5"
    _save(body, path)
    network = build_network(_config(name, in_channels=3, weights=str(path)), rngs=nnx.Rngs(1))
    network.eval()
    assert _count(network) == model.count_params()
    for layer, ours in (("hidden", network.hidden), ("logits", network.logits)):
        model.get_layer(layer).set_weights([np.asarray(ours.kernel[...]), np.asarray(ours.bias[...])])
    pixels = np.random.default_rng(0).uniform(0, 255, (2, SMALLEST[name], SMALLEST[name], 3)).astype(np.float32)
    with jax.numpy_rank_promotion("allow"):
        seen = getattr(keras.applications, MODULES.get(name, name)).preprocess_input(pixels.copy())
        expected = np.asarray(jax.jit(lambda x: model(x, training=False))(seen))
    largest = np.abs(expected).max()
    spread = np.abs(expected[0] - expected[1]).max()
    assert spread > 5e-3 * largest, "nothing of the image reaches the logits, so nothing is compared"
    found = _logits(network, jnp.asarray(pixels / 255 - 0.5))
    # The statistics of four images leave logits in the hundreds, so the bound goes by their size.
    np.testing.assert_allclose(found / largest, expected / largest, rtol=0, atol=1e-4)


@pytest.mark.torture
@pytest.mark.parametrize("name", [n for n in NETWORKS if TORTURE or n not in DEEPEST])
def test_networks_have_the_published_number_of_parameters(name):
    network = nnx.eval_shape(lambda: build_network(_config(name, in_channels=3, classes=5), rngs=nnx.Rngs(0)))
    assert _count(network.body) == PUBLISHED[name]
    assert _count(network) - PUBLISHED[name] == network.body.out_channels * 256 + 256 + 256 * 5 + 5


@pytest.mark.torture
@pytest.mark.skipif(not TORTURE, reason="minutes of building networks in Keras; set CAPSFL_TORTURE=1")
@pytest.mark.parametrize("name", KERAS)
def test_every_network_gives_the_logits_of_keras_after_copying_weights(keras, name, tmp_path):
    _compare(keras, name, tmp_path)


def _write_legacy(path: Any, network: Any, numbers: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """A file as Keras 1 and 2 wrote them, the published ones among them: three channels, slashes in the names."""
    orders = {
        Conv: ("kernel", "bias"),
        DepthwiseConv: ("kernel",),
        SeparableConv: ("depthwise", "pointwise"),
        BatchNorm: ("scale", "bias", "mean", "var"),
    }
    layers = {}
    for _, layer in nnx.iter_modules(network.body):
        if not isinstance(layer, (Conv, DepthwiseConv, SeparableConv, BatchNorm)):
            continue
        arrays = []
        for leaf in orders[type(layer)]:
            if (variable := getattr(layer, leaf)) is None:
                continue
            shape = list(variable.shape)
            if leaf == "depthwise" or isinstance(layer, DepthwiseConv):
                shape[2:] = shape[3], 1
            elif len(shape) == 4 and shape[2] == 1:
                shape[2] = 3
            arrays.append(numbers.uniform(0.5, 1.5, shape).astype(np.float32))
        layers[layer.name.replace("_", "/", 1)] = arrays
    _write(path, layers)
    return layers


@pytest.mark.parametrize("name", ["mobilenet", "xception"])
def test_an_old_file_fills_every_layer_and_one_channel_takes_the_sum_of_three(name, tmp_path):
    config = _config(name)
    graph, state = nnx.split(nnx.eval_shape(lambda: build_network(config, rngs=nnx.Rngs(0))))
    _, weights, rest = nnx.split_state(state, nnx.RngState, (nnx.Param, nnx.BatchStat), ...)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), weights)
    network: Any = nnx.merge(graph, zeros, rest)
    written = _write_legacy(tmp_path / "old.h5", network, np.random.default_rng(0))
    load_imagenet(network.body, config.model_copy(update={"weights": str(tmp_path / "old.h5")}))
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(nnx.state(network.body, (nnx.Param, nnx.BatchStat))))
    first = {"mobilenet": "conv1", "xception": "block1/conv1"}[name]
    conv = network.body.conv if name == "mobilenet" else network.body.convs[0]
    np.testing.assert_allclose(conv.kernel[...], written[first][0].sum(2, keepdims=True), rtol=1e-6)
    if name == "mobilenet":
        kernel = network.body.blocks[2].depthwise.kernel[...]
        np.testing.assert_array_equal(kernel[:, :, 0], written["conv/dw_3"][0][..., 0])
        norm = network.body.blocks[2].pointwise_norm
        for leaf, array in zip((norm.scale, norm.bias, norm.mean, norm.var), written["conv/pw_3_bn"], strict=True):
            np.testing.assert_array_equal(leaf[...], array)
    other = _config({"mobilenet": "mobilenetv2", "xception": "vgg16"}[name], weights=str(tmp_path / "old.h5"))
    message = r"old.h5: (no layer .*; its layers are|layer block1_conv1 has 1 arrays)"
    with pytest.raises(KerasWeightsError, match=message):
        load_imagenet(nnx.eval_shape(lambda: Network(other, rngs=nnx.Rngs(0))).body, other)


def _write(path: Any, layers: dict[str, list[np.ndarray]]) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in layers]
        for name, arrays in layers.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"w{i}".encode() for i in range(len(arrays))]
            for i, array in enumerate(arrays):
                group[f"w{i}"] = array


def test_layers_that_nobody_named_are_numbered_from_zero(tmp_path):
    _write(tmp_path / "w.h5", {f"conv2d_{n}": [np.full(1, n)] for n in (12, 9, 10)} | {"dense": [np.ones(2)]})
    found = read_keras_weights(tmp_path / "w.h5")
    assert {name: arrays[0][0] for name, arrays in found.items()} == {
        "conv2d_0": 9, "conv2d_1": 10, "conv2d_2": 12, "dense_0": 1
    }  # fmt: skip


def test_weights_that_do_not_fit_are_named(tmp_path):
    def build(**fields: Any) -> Any:
        return build_network(_config("alexnet" if not fields else "vgg16", **fields), rngs=nnx.Rngs(0))

    with pytest.raises(KerasWeightsError, match=r"weights = none.h5: no such file; get it from https://.*vgg16.*notop"):
        build(weights="none.h5")
    (tmp_path / "text.h5").write_text("no weights")
    with pytest.raises(KerasWeightsError, match=r"text.h5: .*; name a .h5 file of Keras"):
        build(weights=str(tmp_path / "text.h5"))
    _write(tmp_path / "empty.h5", {})
    with pytest.raises(KerasWeightsError, match="holds no layers with weights"):
        build(weights=str(tmp_path / "empty.h5"))
    shapes = {"block1_conv1": (5, 5, 3, 64), "block1_conv2": (3, 3, 64, 64)}
    _write(tmp_path / "other.h5", {name: [np.ones(s), np.ones(64)] for name, s in shapes.items()})
    with pytest.raises(
        KerasWeightsError,
        match=r"blocks.0.0.kernel \(layer block1_conv1\) is \(5, 5, 1, 64\) there and \(3, 3, 1, 64\) here",
    ):
        build(weights=str(tmp_path / "other.h5"))
    with pytest.raises(ValidationError, match='weights of Keras\'s resnet50 are made with norm = "batch"; set it'):
        _config("resnet50", weights="w.h5", norm="group")


@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_too_small_is_refused_with_the_smallest(name):
    assert parse_network({"name": name, "image_size": SMALLEST[name]}).image_size == SMALLEST[name]
    with pytest.raises(ValidationError, match=f"{name} needs images of at least {SMALLEST[name]} pixels a side"):
        parse_network({"name": name, "image_size": SMALLEST[name] - 1})


def test_an_unknown_network_is_refused_with_the_known_ones():
    with pytest.raises(ValidationError) as refused:
        parse_network({"name": "resnet51", "image_size": 64})
    assert all(f"'{name}'" in str(refused.value) for name in NETWORKS)


@pytest.mark.parametrize("name", ["alexnet", "mobilenet"])
def test_group_normalisation_holds_nothing_but_parameters(name):
    network = nnx.eval_shape(lambda: build_network(_config(name, norm="group"), rngs=nnx.Rngs(0)))
    assert not jax.tree.leaves(nnx.state(network, nnx.BatchStat))
    batch = nnx.eval_shape(lambda: build_network(_config(name, norm="batch"), rngs=nnx.Rngs(0)))
    assert _count(network) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(batch, nnx.Param)))


def test_batch_normalisation_is_that_of_flax():
    images = jax.random.normal(jax.random.key(0), (3, 4, 5, 6)) * 3 + 1
    ours = BatchNorm("bn", 6, momentum=0.7, epsilon=1e-3)
    flax = nnx.BatchNorm(6, momentum=0.7, epsilon=1e-3, rngs=nnx.Rngs(0))
    for _ in range(2):
        np.testing.assert_allclose(ours(images), flax(images), atol=1e-5)
    ours.eval()
    flax.eval()
    np.testing.assert_allclose(ours(images), flax(images), atol=1e-5)
    assert np.abs(np.asarray(ours(images)).mean()) > 0.1, "the running statistics have not yet settled"


@pytest.mark.parametrize(("strides", "padding"), [(1, "SAME"), (2, "SAME"), (2, "VALID")])
def test_depthwise_convolution_and_pools_are_those_of_lax(strides, padding):
    images = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 3))
    grouped = jax.lax.conv_general_dilated(
        images, kernel, (strides,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    found = depthwise_convolve(images, kernel, strides=strides, padding=padding)
    np.testing.assert_allclose(found, grouped, atol=1e-5)
    if strides == 2:
        pooled = jax.lax.reduce_window(images, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
        np.testing.assert_array_equal(max_pool_3x3(images, padding=padding), pooled)
    else:
        ones = jnp.ones_like(images)
        sums, counts = (
            jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") for x in (images, ones)
        )
        np.testing.assert_allclose(mean_pool_3x3(images), sums / counts, atol=1e-6)
