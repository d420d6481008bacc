"""Layers of convolutional capsules that tests and benchmarks share."""

from typing import NamedTuple

from capsfl_kernels.convolutional.geometry import Padding


class Case(NamedTuple):
    """One layer: image size, I input types of dimension A, k × k kernel, M output types of dimension K."""

    size: tuple[int, int]
    types: int
    depth: int
    window: int
    capsules: int
    dim: int
    strides: int = 1
    transpose: bool = False
    padding: Padding = "SAME"
    num_iters: int = 3


SMALL = (
    Case((6, 5), types=3, depth=2, window=5, capsules=2, dim=3),
    Case((7, 6), types=2, depth=3, window=5, capsules=3, dim=2, strides=2),
    Case((8, 7), types=2, depth=2, window=3, capsules=2, dim=2, strides=2, padding="VALID"),
    Case((4, 3), types=3, depth=2, window=4, capsules=2, dim=3, strides=2, transpose=True),
    Case((3, 4), types=2, depth=2, window=5, capsules=2, dim=2, strides=3, transpose=True, num_iters=2),
    Case((3, 4), types=2, depth=2, window=3, capsules=2, dim=2, strides=2, transpose=True, padding="VALID"),
    Case((3, 3), types=2, depth=2, window=1, capsules=2, dim=2, strides=2, transpose=True),
    Case((5, 5), types=3, depth=2, window=1, capsules=1, dim=4),
    Case((5, 4), types=1, depth=3, window=3, capsules=4, dim=2, num_iters=1),
)

# SegCaps (LaLonde & Bagci 2018) at a 512 × 512 slice.
SEGCAPS = {
    "primarycaps": Case((512, 512), 1, 16, 5, 2, 16, strides=2, num_iters=1),
    "conv_cap_2_1": Case((256, 256), 2, 16, 5, 4, 16, num_iters=1),
    "conv_cap_2_2": Case((256, 256), 4, 16, 5, 4, 32, strides=2),
    "conv_cap_3_1": Case((128, 128), 4, 32, 5, 8, 32),
    "conv_cap_3_2": Case((128, 128), 8, 32, 5, 8, 64, strides=2),
    "conv_cap_4_1": Case((64, 64), 8, 64, 5, 8, 32),
    "deconv_cap_1_1": Case((64, 64), 8, 32, 4, 8, 32, strides=2, transpose=True),
    "deconv_cap_1_2": Case((128, 128), 16, 32, 5, 4, 32),
    "deconv_cap_2_1": Case((128, 128), 4, 32, 4, 4, 16, strides=2, transpose=True),
    "deconv_cap_2_2": Case((256, 256), 8, 16, 5, 4, 16),
    "deconv_cap_3_1": Case((256, 256), 4, 16, 4, 2, 16, strides=2, transpose=True),
    "seg_caps": Case((512, 512), 3, 16, 1, 1, 16),
}
