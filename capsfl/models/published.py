"""Weights of the published CapsNet and SegCaps codes, read from the HDF5 files that their Keras saved.

CapsNet in Keras (https://github.com/XifengGuo/CapsNet-Keras): layers conv1, primarycap_conv2d, digitcaps, decoder.
SegCaps (https://github.com/lalonde/SegCaps): our layers carry the names of its own.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsfl.models.capsnet import CapsNet
from capsfl.models.keras_weights import KerasWeightsError, check_shape, read_keras_weights, take
from capsfl.models.layers import Conv, ConvCapsules
from capsfl.models.segcaps import SegCaps

Row = tuple[str, nnx.Variable, Callable[[np.ndarray], np.ndarray]]
"""Name of a leaf, the leaf, and what makes of Keras's array one of the leaf's shape."""

_SEGCAPS_CONVS = ("conv1", "recon.recon_1", "recon.recon_2", "recon.out_recon")
_SEGCAPS_CAPSULES = (
    "primarycaps",
    "conv_cap_2_1",
    "conv_cap_2_2",
    "conv_cap_3_1",
    "conv_cap_3_2",
    "conv_cap_4_1",
    "deconv_cap_1_1",
    "deconv_cap_1_2",
    "deconv_cap_2_1",
    "deconv_cap_2_2",
    "deconv_cap_3_1",
    "seg_caps",
)


def load_capsnet(model: CapsNet, path: Path) -> None:
    """Fill a CapsNet from a file of CapsNet-Keras; without its decoder where the model has none.

    Raises:
        KerasWeightsError: no such file, or weights of another network: names the first leaf that differs.
    """
    if model.hidden is not None:
        raise KerasWeightsError(f"{path}: the published CapsNet has no second convolution; leave `hidden` out")
    rows: dict[str, list[Row]] = {
        "conv1": list(_conv("conv", model.conv)),
        "primarycap_conv2d": list(_conv("primary.conv", model.primary.conv)),
        # (classes, capsules, dim, primary dim) there.
        "digitcaps": [("digit.weights", model.digit.weights, lambda array: array.transpose(1, 0, 2, 3))],
    }
    if model.decoder is not None:
        decoder: list[Row] = []
        for index, layer in enumerate(model.decoder.layers):
            assert layer.bias is not None
            decoder.append((f"decoder.layers.{index}.kernel", layer.kernel, _same))
            decoder.append((f"decoder.layers.{index}.bias", layer.bias, _same))
        rows["decoder"] = decoder
    _fill(path, rows)


def load_segcaps(model: SegCaps, path: Path) -> None:
    """Fill a SegCaps from a file of the authors' code, of R1 or R3; without the reconstruction where there is none.

    Raises:
        KerasWeightsError: no such file, or weights of another network: names the first leaf that differs.
    """
    rows: dict[str, list[Row]] = {}
    for name in _SEGCAPS_CONVS:
        *folder, layer = name.split(".")
        if not folder:
            rows[layer] = list(_conv(name, getattr(model, layer)))
        elif model.recon is not None:
            rows[layer] = list(_conv(name, getattr(model.recon, layer)))
    for name in _SEGCAPS_CAPSULES:
        rows[name] = list(_capsules(name, getattr(model, name)))
    _fill(path, rows)


def _conv(name: str, layer: Conv) -> Iterator[Row]:
    yield f"{name}.kernel", layer.kernel, _same
    yield f"{name}.bias", layer.bias, _same


def _capsules(name: str, layer: ConvCapsules) -> Iterator[Row]:
    """Kernels are flat there: `(k, k, in, capsules * dim)`, or transposed `(k, k, capsules * dim, in)`."""
    shape = layer.kernel.shape

    def unfolded(array: np.ndarray) -> np.ndarray:
        if array.ndim != 4:
            return array
        array = array.swapaxes(2, 3) if layer.transpose else array
        fits = array.shape == (*shape[:3], shape[3] * shape[4])
        return array.reshape(shape) if fits else array

    yield f"{name}.kernel", layer.kernel, unfolded
    yield f"{name}.bias", layer.bias, lambda array: array.reshape(array.shape[-2:])


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _fill(path: Path, rows: dict[str, list[Row]]) -> None:
    """Sets every leaf, or none where one does not fit."""
    if not path.is_file():
        raise KerasWeightsError(f"{path}: no such file; name the .h5 or .hdf5 file that the published code has saved")
    weights = read_keras_weights(path)
    fitting = []
    for layer, leaves in rows.items():
        for (leaf, variable, arranged), array in zip(leaves, take(path, weights, layer, len(leaves)), strict=True):
            there = arranged(array)
            check_shape(path, leaf, layer, there.shape, variable.shape)
            fitting.append((variable, there))
    for variable, array in fitting:
        variable[...] = jnp.asarray(array, variable.dtype)
