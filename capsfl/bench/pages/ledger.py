"""The ledger's cost on the page."""

from collections.abc import Iterator
from typing import Any

from capsfl.bench.pages.section import Section, Table

READING = """A round's record names 28 tensors and a cohort of eight. Decided by members, it also holds eight
commitments, each countersigned, eight ballots, a decision and eight approvals. CPU is what building, signing and
admitting a block takes, hashing of tensors left out; verified are rounds read back with every signature and rule
checked, a minute of CPU. The path is the audit path of the last block: 32 bytes a level. Beside a training, a record
takes the digests of the weights (and of every hospital's update, where members decide), signatures and two syncs to
disk; overhead is what the wall time of a round grows by: median and quartiles over rounds with and without in turns.
CPU share is the record's processor time over that of a round."""

NUMBERS = frozenset({"rounds", "signatures", "CPU ms", "verified a minute", "round bytes", "path bytes", "weights"})


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of one result."""
    yield Table(
        f"Rounds of {result['members']} hospitals",
        ("decided by", "curve", "rounds", "signatures", "CPU ms", "verified a minute", "round bytes", "path bytes"),
        [
            (
                row["decided"],
                row["curve"],
                f"{row['rounds']:,}",
                f"{row['signatures']:.0f}",
                f"{1e3 * row['record_cpu_s']:.3g}",
                f"{row['verified_per_cpu_minute']:,.0f}",
                f"{row['round_bytes']:,.0f}",
                str(row["path_bytes"]),
            )
            for row in result["rows"]
        ],
    )
    yield Table(
        "SegCaps over eight hospitals, each round recorded while the next one computes",
        (
            "decided by",
            "weights",
            "rounds",
            "round s",
            "with its record s",
            "overhead",
            "record ms",
            "CPU ms",
            "CPU share",
        ),
        [
            (
                row["decided"],
                f"{row['parameters']:,}",
                str(row["rounds"]),
                f"{row['round_wall_s']:.3g}",
                f"{row['recorded_round_wall_s']:.3g}",
                "{:+.1%} ({:+.1%} to {:+.1%})".format(row["overhead"], *row["overhead_quartiles"]),
                f"{1e3 * row['record_wall_s']:.3g}",
                f"{1e3 * row['record_cpu_s']:.3g}",
                f"{row['cpu_share']:.2%}",
            )
            for row in result.get("overhead", ())
        ],
    )


SECTIONS = {"ledger": Section("The ledger", READING, tables, NUMBERS)}
