"""Accuracy at a given epsilon on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.cells import number
from capsfl.bench.pages.section import Section, Table

READING = """MNIST, sorted by digit and cut into two shards a hospital, after Geyer, Klein & Nabi 2017. Noise is
solved for, so that all rounds together cost epsilon under the relation that goes with the sampling: adding or removing
one hospital for Poisson, replacing one for fixed. `fixed, replace one` is what the row's noise would cost under fixed
sampling. Accuracy is on the 10,000 test images: median over seeds, smallest and largest. At 10,000 hospitals each
holds six images."""

NUMBERS = frozenset({"hospitals", "cohort", "rounds", "z", "epsilon", "fixed, replace one", "goal"})


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one result."""
    yield Table(
        f"Epsilon {result['target_epsilon']:g}",
        (
            "hospitals",
            "cohort",
            "delta",
            "rounds",
            "sampling",
            "z",
            "epsilon",
            "fixed, replace one",
            "accuracy",
            "goal",
        ),
        [
            (
                f"{row['hospitals']:,}",
                str(row["cohort"]),
                f"{row['delta']:g}",
                str(row["rounds"]),
                f"{row['sampler']}, {row['relation'].replace('_', ' ')}",
                f"{row['noise_multiplier']:.3f}",
                f"{row['epsilon']:.2f}",
                number(row["epsilon_fixed_replace_one"], "{:.1f}"),
                "{median:.3f} ({min:.3f} to {max:.3f})".format(**row["accuracy"]),
                number(row["goal"], "{:.2f}"),
            )
            for row in result["rows"]
        ],
    )


SECTIONS = {"geyer": Section("Accuracy at a given epsilon", READING, tables, NUMBERS)}
