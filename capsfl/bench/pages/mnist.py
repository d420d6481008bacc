"""Digits on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.section import Section, Table

READING = """Error on the 10,000 test images after the last epoch, never on a better one before it. Weights are
those outside the decoder, which only training sees. Seconds are those of training, compilation included."""

AFFINE_READING = """Trained on digits at a random place of a black canvas of 40 x 40 pixels, scored on test digits so
placed and on the same ones turned (to 20 degrees), sheared (to 0.2) and scaled (0.8 to 1.2 along each axis) about
their own middle with all their ink on the canvas, the ranges of affNIST. The convolutional network has the same four
convolutions and as many weights."""

NUMBERS = frozenset({"weights", "seed", "test", "distorted", "wall s", "CPU s"})


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one result."""
    parts = list(result["rows"][0]["error_percent"])
    goal = "" if result["goal_percent"] is None else f", goal {result['goal_percent']:g} %"
    yield Table(
        f"Error in percent after {result['config']['training']['epochs']} epochs{goal}",
        ("network", "weights", "seed", *parts, "wall s", "CPU s"),
        [
            (
                row["network"],
                f"{row['weights']:,}",
                str(row["seed"]),
                *(f"{row['error_percent'][part]:.2f}" for part in parts),
                f"{row['seconds']:.0f}",
                f"{row['cpu_seconds']:.0f}",
            )
            for row in result["rows"]
        ]
        + [
            (name, "", "mean", *(f"{figures[part]:.2f}" for part in parts), "", "")
            for name, figures in result["summary"].items()
        ],
    )


SECTIONS = {
    "mnist-capsnet": Section("CapsNet on MNIST", READING, tables, NUMBERS),
    "mnist-efficient_capsnet": Section("Efficient-CapsNet on MNIST", READING, tables, NUMBERS),
    "mnist-affine-capsnet": Section("CapsNet on distorted digits", AFFINE_READING, tables, NUMBERS),
    "mnist-affine-efficient_capsnet": Section("Efficient-CapsNet on distorted digits", AFFINE_READING, tables, NUMBERS),
}
