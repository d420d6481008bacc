"""Weights of `keras.applications` for the bodies of the zoo, and the intensities that they were trained on."""

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsfl.models.keras_weights import KerasWeightsError, check_shape, read_keras_weights, take
from capsfl.models.zoo.config import NetworkConfig
from capsfl.models.zoo.layers import BatchNorm, Conv, DepthwiseConv, SeparableConv

_PLACE = "https://storage.googleapis.com/tensorflow/keras-applications"
_LONG = "weights_tf_dim_ordering_tf_kernels"

PUBLISHED = {
    "vgg16": f"{_PLACE}/vgg16/vgg16_{_LONG}_notop.h5",
    "vgg19": f"{_PLACE}/vgg19/vgg19_{_LONG}_notop.h5",
    "xception": f"{_PLACE}/xception/xception_{_LONG}_notop.h5",
    "resnet50": f"{_PLACE}/resnet/resnet50_{_LONG}_notop.h5",
    "resnet50v2": f"{_PLACE}/resnet/resnet50v2_{_LONG}_notop.h5",
    "resnet152v2": f"{_PLACE}/resnet/resnet152v2_{_LONG}_notop.h5",
    "inceptionv3": f"{_PLACE}/inception_v3/inception_v3_{_LONG}_notop.h5",
    "mobilenet": f"{_PLACE}/mobilenet/mobilenet_1_0_224_tf_no_top.h5",
    "mobilenetv2": f"{_PLACE}/mobilenet_v2/mobilenet_v2_{_LONG}_1.0_224_no_top.h5",
    "densenet121": f"{_PLACE}/densenet/densenet121_{_LONG}_notop.h5",
    "densenet169": f"{_PLACE}/densenet/densenet169_{_LONG}_notop.h5",
    "densenet201": f"{_PLACE}/densenet/densenet201_{_LONG}_notop.h5",
}
"""Where Keras publishes the weights without the classifier."""

# What the published networks see of intensities p in [0, 1], red, green, blue (`preprocess_input` of Keras).
_MEANS = np.array([0.485, 0.456, 0.406])
_DEVIATIONS = np.array([0.229, 0.224, 0.225])
_CAFFE_MEANS = np.array([123.68, 116.779, 103.939])
_CAFFE = ("vgg16", "vgg19", "resnet50")
_TORCH = ("densenet121", "densenet169", "densenet201")


def input_transform(name: str, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return scale and offset `(in_channels,)` from the window's [-0.5, 0.5] to what published weights expect.

    One channel stands for three equal ones, so it takes the mean of theirs: exact where all are alike, as for
    Xception, InceptionV3, the MobileNets and the second ResNets.
    """
    if name in _CAFFE:
        scale, offset = np.full(3, 255.0), 127.5 - _CAFFE_MEANS
    elif name in _TORCH:
        scale, offset = 1 / _DEVIATIONS, (0.5 - _MEANS) / _DEVIATIONS
    else:
        scale, offset = np.full(3, 2.0), np.zeros(3)
    if in_channels == 1:
        scale, offset = scale.mean(keepdims=True), offset.mean(keepdims=True)
    return tuple(scale.tolist()), tuple(offset.tolist())


def load_imagenet(body: nnx.Module, config: NetworkConfig) -> None:
    """Fill the body of a network from `config.weights`; for one channel the first kernel is summed over its three.

    Raises:
        KerasWeightsError: the file is missing (says where to get it), or of another network: names the first leaf.
    """
    name, path = str(getattr(config, "name", "")), Path(config.weights)
    if not path.is_file():
        raise KerasWeightsError(f"weights = {config.weights}: no such file; get it from {PUBLISHED[name]}")
    found = read_keras_weights(path)
    for place, layer in nnx.iter_modules(body):
        targets = list(_targets(layer))
        if not targets:
            continue
        assert isinstance(layer, _NAMED)
        arrays = take(path, found, layer.name, len(targets))
        for (leaf, variable), array in zip(targets, arrays, strict=True):
            if leaf in ("depthwise", "kernel"):
                array = _kernel(name, array, config.in_channels) if isinstance(layer, Conv) else array.swapaxes(2, 3)
            check_shape(path, ".".join([*map(str, place), leaf]), layer.name, array.shape, variable.shape)
            variable[...] = jnp.asarray(array, variable.dtype)


_NAMED = (Conv, DepthwiseConv, SeparableConv, BatchNorm)


def _targets(layer: object) -> Iterator[tuple[str, nnx.Variable]]:
    """The variables of a layer in the order in which Keras saves them."""
    names = ()
    if isinstance(layer, (Conv, DepthwiseConv)):
        names = ("kernel", "bias")
    elif isinstance(layer, SeparableConv):
        names = ("depthwise", "pointwise")
    elif isinstance(layer, BatchNorm):
        names = ("scale", "bias", "mean", "var")
    for name in names:
        variable = getattr(layer, name, None)
        if variable is not None:
            yield name, variable


def _kernel(name: str, kernel: np.ndarray, in_channels: int) -> np.ndarray:
    """A kernel as it is, unless it is the one that sees the image."""
    if kernel.shape[2] != 3:
        return kernel
    # Caffe's networks see blue, green, red.
    kernel = kernel[:, :, ::-1] if name in _CAFFE else kernel
    return kernel.sum(axis=2, keepdims=True) if in_channels == 1 else kernel
