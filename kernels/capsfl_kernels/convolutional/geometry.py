"""Where the windows of a convolution lie: padding and output size, forward and transposed."""

from typing import Literal, NamedTuple

Padding = Literal["SAME", "VALID"]


class Geometry(NamedTuple):
    """Static shape of a square convolution over (height, width).

    Attributes:
        window: Rows and columns of the kernel.
        stride: Of the window, or of the output where transposed.
        transpose: Whether it is the adjoint of the strided convolution, so the output is the larger image.
        padding: (before, after) for rows and for columns, around the (dilated, where transposed) image.
        output: Rows and columns of the output.
    """

    window: int
    stride: int
    transpose: bool
    padding: tuple[tuple[int, int], tuple[int, int]]
    output: tuple[int, int]


def plan(size: tuple[int, int], window: int, stride: int, transpose: bool, padding: Padding) -> Geometry:
    """The geometry of a convolution over an image of ``size`` (height, width)."""
    axes = [_plan_axis(length, window, stride, transpose, padding) for length in size]
    (rows, height), (columns, width) = axes
    return Geometry(window, stride, transpose, (rows, columns), (height, width))


def _plan_axis(length: int, window: int, stride: int, transpose: bool, padding: Padding) -> tuple[tuple[int, int], int]:
    if transpose:
        # The adjoint of a strided convolution whose own padding put `before` zeros in front of its input.
        output = length * stride if padding == "SAME" else (length - 1) * stride + window
        before = max(window - stride, 0) // 2 if padding == "SAME" else 0
        first = window - 1 - before
        return (first, output + window - 1 - ((length - 1) * stride + 1) - first), output
    if padding == "VALID":
        return (0, 0), (length - window) // stride + 1
    output = -(-length // stride)
    total = max((output - 1) * stride + window - length, 0)
    return (total // 2, total - total // 2), output
