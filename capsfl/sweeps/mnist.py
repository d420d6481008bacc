"""MNIST from its IDX files, and its split over hospitals."""

import gzip
import math
from pathlib import Path
from typing import Literal

import numpy as np

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
VALIDATION = 10_000
"""Training images at the end that are held out for validation."""

Records = dict[str, np.ndarray]


def read_mnist(
    folder: Path, *, scored_on: Literal["validation", "test"] = "test", pool: int = 1
) -> tuple[Records, Records]:
    """Reads MNIST: `{"image": (n, 28, 28, 1) float32 in [0, 1], "label": (n,) int32}` to train on and to score on.

    Args:
        folder: with the four IDX files, gzipped or not.
        scored_on: the last 10,000 training images, then not trained on, or the 10,000 test images.
        pool: averages blocks of so many pixels a side; divides 28.

    Raises:
        ValueError: a file that is absent, damaged, or not of MNIST's kind; the message names it.
    """
    train = _read_pair(folder, "train", pool)
    if scored_on == "test":
        return train, _read_pair(folder, "test", pool)
    if len(train["label"]) <= VALIDATION:
        raise ValueError(f"{folder}: {len(train['label'])} training images; {VALIDATION} are held out, so name more")
    cut = len(train["label"]) - VALIDATION
    return {k: v[:cut] for k, v in train.items()}, {k: v[cut:] for k, v in train.items()}


def split_over_hospitals(
    labels: np.ndarray, *, hospitals: int, shards: int | None, most: int | None, seed: int
) -> list[np.ndarray]:
    """Returns the rows of every hospital.

    With `shards`, rows sorted by label are cut into `hospitals * shards` runs, and every hospital gets `shards` of
    them at random (McMahan et al. 2017, section 3); with None, rows are dealt out evenly at random.

    Args:
        labels: `(rows,)`.
        hospitals: H.
        shards: runs of one hospital, or None.
        most: rows of a hospital at most, chosen at random.
        seed: of the split.

    Raises:
        ValueError: more runs than rows.
    """
    generator = np.random.default_rng(seed)
    runs = hospitals * (shards or 1)
    if runs > len(labels):
        raise ValueError(f"problem.hospitals = {hospitals}: {runs} shards of {len(labels)} images; name fewer")
    order = generator.permutation(len(labels))
    if shards is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, runs)
    dealt = generator.permutation(runs).reshape(hospitals, -1)
    shares = [np.concatenate([pieces[piece] for piece in row]) for row in dealt]
    return [np.sort(generator.permutation(share)[:most]) for share in shares]


def _read_pair(folder: Path, part: str, pool: int) -> Records:
    images, labels = (_read_idx(folder, name) for name in FILES[part])
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images and {len(labels)} labels in {part}; expected one of each")
    count, height, width = images.shape
    blocks = images.reshape(count, height // pool, pool, width // pool, pool)
    grey = blocks.mean(axis=(2, 4), dtype=np.float32) / np.float32(255)
    return {"image": grey[..., None], "label": labels.astype(np.int32)}


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """Reads one IDX file of unsigned bytes: two zero bytes, the type 8, the rank, big-endian sizes, the data."""
    found = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
    if found is None:
        raise ValueError(f"problem.folder = {folder}: no {name} or {name}.gz there; name the folder of MNIST's files")
    try:
        data = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{found}: unreadable ({error})") from error
    rank = data[3] if len(data) > 3 else 0
    start = 4 + 4 * rank
    sizes = np.frombuffer(data[4:start], ">u4").tolist() if len(data) >= start else []
    if data[:3] != b"\0\0\x08" or len(data) - start != math.prod(sizes):
        raise ValueError(f"{found}: not an IDX file of bytes, or cut short; fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)
