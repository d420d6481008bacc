"""Weights of the published CapsNet and SegCaps: files of their layout fill our networks, and give what Keras gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capsfl.learning.networks import make_network
from capsfl.models.capsnet import CapsNet, CapsNetConfig
from capsfl.models.keras_weights import KerasWeightsError
from capsfl.models.published import load_capsnet, load_segcaps
from capsfl.models.segcaps import SegCaps, SegCapsConfig

h5py = pytest.importorskip("h5py", reason="needs h5py; pip install 'capsfl[keras]'")

CAPSNET = CapsNetConfig(
    image_size=12, classes=3, conv_channels=4, conv_kernel=3, primary_capsules=2, primary_dim=4, primary_kernel=3,
    digit_dim=5, num_iters=1, decoder=(6, 7),
)  # fmt: skip
SEGCAPS = SegCapsConfig(width=0.25, num_iters=1)


def _write(path: Any, layers: dict[str, list[np.ndarray]]) -> None:
    """A file as `Model.save_weights` of Keras 2 lays it out."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in ["input_1", *layers, "mask"]]
        file.attrs["backend"] = b"tensorflow"
        for name in ["input_1", *layers, "mask"]:
            group = file.create_group(name)
            arrays = layers.get(name, [])
            group.attrs["weight_names"] = [f"{name}/variable_{i}:0".encode() for i in range(len(arrays))]
            for i, array in enumerate(arrays):
                group[f"{name}/variable_{i}:0"] = array


def _draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(scale=0.2, size=shape).astype(np.float32)


def _capsnet_layers(positions: int) -> dict[str, list[np.ndarray]]:
    """Shapes of CapsNet-Keras: `CapsuleLayer.W` is (capsules, inputs, dim, inputs' dim)."""
    return {
        "conv1": [_draw(3, 3, 1, 4), _draw(4)],
        "primarycap_conv2d": [_draw(3, 3, 4, 8), _draw(8)],
        "digitcaps": [_draw(3, 2 * positions**2, 5, 4)],
        "decoder": [_draw(15, 6), _draw(6), _draw(6, 7), _draw(7), _draw(7, 144), _draw(144)],
    }


def test_capsnet_of_keras_gives_its_capsules_and_its_reconstruction(tmp_path):
    layers = _capsnet_layers(CAPSNET.primary_size())
    _write(tmp_path / "trained_model.h5", layers)
    model = CapsNet(CAPSNET, rngs=nnx.Rngs(0))
    load_capsnet(model, tmp_path / "trained_model.h5")
    images = jax.random.uniform(jax.random.key(0), (2, 12, 12, 1))
    output = nnx.jit(lambda network, x: network(x))(model, images)

    def conv(x, kernel, bias, strides):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=numbers) + bias.reshape(
            1, 1, 1, -1
        )

    def squash(s):
        squares = np.sum(np.square(s), -1, keepdims=True)
        return squares / (1 + squares) * s / np.sqrt(squares)

    (kernel, bias), (kernel_2, bias_2) = layers["conv1"], layers["primarycap_conv2d"]
    features = jax.nn.relu(conv(images, kernel, bias, (1, 1)))
    primary = squash(np.asarray(conv(features, kernel_2, bias_2, (2, 2))).reshape(2, -1, 4))
    # K.batch_dot of the code: every input's vote is W (dim, inputs' dim) times the input; routed once, a mean.
    votes = np.einsum("jidk,nik->njid", layers["digitcaps"][0], primary)
    capsules = squash(votes.sum(2) / 3)
    np.testing.assert_allclose(output.capsules, capsules, rtol=1e-4, atol=1e-6)
    masked = capsules * (np.arange(3)[None, :, None] == np.linalg.norm(capsules, axis=-1).argmax(1)[:, None, None])
    first, second, last = (layers["decoder"][i : i + 2] for i in (0, 2, 4))
    hidden = np.maximum(masked.reshape(2, -1) @ first[0] + first[1][None], 0)
    hidden = np.maximum(hidden @ second[0] + second[1][None], 0)
    pixels = 1 / (1 + np.exp(-(hidden @ last[0] + last[1][None])))
    assert output.reconstruction is not None
    np.testing.assert_allclose(output.reconstruction.reshape(2, -1), pixels, rtol=1e-4)


def _segcaps_layers(model: SegCaps) -> dict[str, list[np.ndarray]]:
    """Shapes of the authors' code: flat kernels, those of `DeconvCapsuleLayer` with the outputs before the inputs."""
    layers = {}
    for name, layer in [*vars(model).items(), *vars(model.recon).items()]:
        if not hasattr(layer, "kernel"):
            continue
        shape = layer.kernel.shape
        if len(shape) == 4:
            layers[name] = [_draw(*shape), _draw(shape[3])]
        else:
            k, _, dim, capsules, out = shape
            kernel = (k, k, capsules * out, dim) if layer.transpose else (k, k, dim, capsules * out)
            layers[name] = [_draw(*kernel), _draw(1, 1, capsules, out)]
    return layers


def test_segcaps_of_keras_fills_every_layer_and_upsamples_as_it_does(tmp_path):
    model = SegCaps(SEGCAPS, rngs=nnx.Rngs(0))
    layers = _segcaps_layers(model)
    assert len(layers) == 16
    _write(tmp_path / "weights.hdf5", layers)
    load_segcaps(model, tmp_path / "weights.hdf5")
    np.testing.assert_array_equal(model.conv1.kernel[...], layers["conv1"][0])
    assert model.recon is not None
    np.testing.assert_array_equal(model.recon.out_recon.bias[...], layers["out_recon"][1])

    # tf.nn.conv2d_transpose of the code adds kernel[y, x] times a pixel at 2 i + y - 1, 2 j + x - 1.
    layer, (kernel, bias) = model.deconv_cap_1_1, layers["deconv_cap_1_1"]
    capsules, out = bias.shape[2:]
    inputs = np.random.default_rng(1).normal(size=(1, 1, 3, 3, kernel.shape[3])).astype(np.float32)
    total = np.zeros((8, 8, capsules * out), np.float32)
    for i, j in np.ndindex(3, 3):
        total[2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += kernel @ inputs[0, 0, i, j]
    votes = total[1:-1, 1:-1].reshape(6, 6, capsules, out) / capsules + bias[0]
    squares = np.sum(np.square(votes), -1, keepdims=True)
    expected = squares / (1 + squares) * votes / np.sqrt(squares)
    found = np.asarray(layer(jnp.asarray(inputs)))[0].transpose(1, 2, 0, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_network_are_refused_by_the_first_leaf_and_change_nothing(tmp_path):
    model = CapsNet(CAPSNET, rngs=nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(model, nnx.Param))
    layers = _capsnet_layers(CAPSNET.primary_size())
    layers["digitcaps"] = [_draw(10, 1152, 16, 8)]
    _write(tmp_path / "mnist.h5", layers)
    message = r"mnist.h5: digit.weights \(layer digitcaps\) is \(1152, 10, 16, 8\) there and \(32, 3, 5, 4\) here"
    with pytest.raises(KerasWeightsError, match=message):
        load_capsnet(model, tmp_path / "mnist.h5")
    del layers["digitcaps"]
    _write(tmp_path / "cnn.h5", layers)
    with pytest.raises(KerasWeightsError, match=r"cnn.h5: no layer digitcaps; its layers are conv1, primarycap_conv2d"):
        load_capsnet(model, tmp_path / "cnn.h5")
    with pytest.raises(KerasWeightsError, match=r"none.h5: no such file; name the .h5 or .hdf5 file"):
        load_segcaps(nnx.eval_shape(lambda: SegCaps(SEGCAPS, rngs=nnx.Rngs(0))), tmp_path / "none.h5")
    for old, new in zip(before, jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_configuration_starts_from_a_file_and_trained_weights_need_none(tmp_path):
    layers = _capsnet_layers(CAPSNET.primary_size())
    _write(tmp_path / "trained_model.h5", layers)
    config = CAPSNET.model_copy(update={"weights": str(tmp_path / "trained_model.h5")})
    model: Any = make_network(config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.conv.kernel[...], layers["conv1"][0])
    gone = CAPSNET.model_copy(update={"weights": str(tmp_path / "gone.h5")})
    with pytest.raises(KerasWeightsError, match=r"gone.h5: no such file"):
        make_network(gone, rngs=nnx.Rngs(0))
    assert make_network(gone, rngs=nnx.Rngs(0), pretrained=False)
