"""Federated rounds on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.cells import milliseconds, number
from capsfl.bench.pages.section import Section, Table, skipped

READING = """One round over all hospitals: local steps, clipping to S, noise, the server's step, records at hand.
L is how many hospitals are vmapped at once; `L automatic` is what the engine chose itself. Ratios are over that row.
`of product` is the part of this machine's own rate of float32 matrix products that the counted operations reach, by
wall time and by CPU time; only convolutions and dense layers are counted, once forward and once for every gradient
needed. Flower computes in processes of its own, so that only its wall time is known. Every framework ends three rounds
without noise at the same loss, or is left out."""

NUMBERS = frozenset({"L", "wall ms", "CPU ms", "CPU", "wall", "of product", "by CPU", "first round s"})


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one result."""
    counted = result["flops"] is not None
    product = result["product"]["flops_per_s"] / 1e9
    work = f", {result['flops'] / 1e9:.2f} GFLOP; float32 products here run at {product:.0f} GFLOP/s" if counted else ""
    yield Table(
        f"{result['hospitals']} hospitals, {result['parameters']:,} weights{work}",
        ("implementation", "L", "wall ms", "CPU ms", "CPU", "wall", "of product", "by CPU", "first round s"),
        [
            (
                " ".join(filter(None, (row["implementation"], row.get("version")))),
                str(row.get("chunk") or "-"),
                milliseconds(row["wall_s"]),
                milliseconds(row["process_cpu_s"]),
                number(row["cpu_ratio"], "{:.2f}x"),
                number(row["wall_ratio"], "{:.2f}x"),
                number(row.get("of_product"), "{:.0%}"),
                number(row.get("of_product_cpu"), "{:.0%}"),
                number(row.get("first_round_s"), "{:.1f}"),
            )
            for row in result["rows"]
        ],
    )
    yield from skipped(result)


SECTIONS = {
    "rounds": Section("One federated round of 100 hospitals", READING, tables, NUMBERS),
    "rounds-segcaps": Section("One federated round, SegCaps", READING, tables, NUMBERS),
    "rounds-capsnet": Section("One federated round, CapsNet", READING, tables, NUMBERS),
}
