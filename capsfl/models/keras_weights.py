"""Weights in the HDF5 files of Keras: the legacy `.h5` and the `.weights.h5` of Keras 3."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Weights = Mapping[str, tuple[np.ndarray, ...]]
"""By the name of a layer its arrays, in the order in which Keras saves them."""

# Layers that nobody named, which Keras numbers through a session: the first one need not be number 0 or 1.
_NUMBERED = re.compile(r"(conv2d|batch_normalization|separable_conv2d|depthwise_conv2d|dense)(?:_(\d+))?")


class KerasWeightsError(ValueError):
    """A file of weights that cannot be used; the message names it and the remedy."""


def read_keras_weights(path: Path) -> Weights:
    """Read all layers that have weights.

    Slashes in the names of old files are read as underscores, and layers that Keras has named by a running number
    are numbered from 0.

    Raises:
        KerasWeightsError: no such file, no HDF5, or not the weights of a Keras model; or h5py is missing.
    """
    try:
        import h5py
    except ImportError as error:
        raise KerasWeightsError(f"{path}: needs h5py; pip install 'capsfl[keras]'") from error
    try:
        with h5py.File(path) as file:
            root: Any = file.get("model_weights", file)
            found = dict(_legacy(root) if "layer_names" in root.attrs else _current(root))
    except OSError as error:
        raise KerasWeightsError(f"{path}: {error.strerror or 'not an HDF5 file'}; name a .h5 file of Keras") from error
    if not found:
        raise KerasWeightsError(f"{path}: holds no layers with weights; name a .h5 or .weights.h5 file of Keras")
    return _renumbered(found)


def take(path: Path, weights: Weights, layer: str, count: int) -> tuple[np.ndarray, ...]:
    """Return the `count` arrays of a layer.

    Raises:
        KerasWeightsError: the file has no such layer, or another number of arrays in it.
    """
    if layer not in weights:
        known = ", ".join(list(weights)[:4])
        raise KerasWeightsError(f"{path}: no layer {layer}; its layers are {known}, ...: weights of another network")
    if len(weights[layer]) != count:
        raise KerasWeightsError(f"{path}: layer {layer} has {len(weights[layer])} arrays there and {count} here")
    return weights[layer]


def check_shape(path: Path, leaf: str, layer: str, there: tuple[int, ...], here: tuple[int, ...]) -> None:
    """Refuse an array of another shape.

    Raises:
        KerasWeightsError: names the leaf and both shapes.
    """
    if there != here:
        raise KerasWeightsError(f"{path}: {leaf} (layer {layer}) is {there} there and {here} here")


def _legacy(root: Any) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    for name in _words(root, "layer_names"):
        weights = _words(root[name], "weight_names")
        if weights:
            yield name.replace("/", "_"), tuple(np.asarray(root[name][weight]) for weight in weights)


def _current(root: Any) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    for name, group in root.get("layers", {}).items():
        arrays = group.get("vars", {})
        if len(arrays):
            # The group is named by the layer's class and its place; the layer's own name is an attribute.
            own = arrays.attrs.get("name", group.attrs.get("name", name))
            yield str(own).replace("/", "_"), tuple(np.asarray(arrays[str(i)]) for i in range(len(arrays)))


def _words(group: Any, attribute: str) -> list[str]:
    """A list of names, which Keras cuts into several attributes where it is long."""
    parts = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(parts)}" in group.attrs:
        parts.append(f"{attribute}{len(parts)}")
    return [w.decode() if isinstance(w, bytes) else str(w) for part in parts for w in group.attrs[part]]


def _renumbered(weights: Weights) -> Weights:
    numbers: dict[str, list[tuple[int, str]]] = {}
    for name in weights:
        if match := _NUMBERED.fullmatch(name):
            numbers.setdefault(match[1], []).append((int(match[2] or 0), name))
    names = {name: f"{kind}_{i}" for kind, rows in numbers.items() for i, (_, name) in enumerate(sorted(rows))}
    return {names.get(name, name): arrays for name, arrays in weights.items()}
