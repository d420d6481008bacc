"""`capsfl bench routing` for a host with jax and numpy alone, from the checkout.

    PYTHONPATH=kernels python -m benchmarks.routing [--quick] [--table] [--tune] [--out FOLDER]

A picture is drawn where matplotlib is there, and torch is measured beside where an interpreter has it.
"""

import argparse
import os
from pathlib import Path

from capsfl.bench.command import Output, finish, redraw, say
from capsfl.bench.machine import results_folder
from capsfl.bench.routing import RoutingBench, measure
from capsfl.bench.tuning import tune


def main() -> None:
    """Measures and writes, or only rewrites the page, or tunes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and few runs")
    parser.add_argument("--table", action="store_true", help="measure nothing, rewrite page and pictures")
    parser.add_argument("--tune", action="store_true", help="find the fastest block sizes and record them")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--peer-python", type=Path, help="interpreter with torch and numpy")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads that torch may use")
    given = parser.parse_args()
    try:
        if given.tune:
            for _ in tune(quick=given.quick, say=say):
                pass
        elif given.table:
            redraw(results_folder(given.out))
        else:
            results_folder(given.out)
            options = RoutingBench(given.quick, given.peer_python, given.threads)
            finish(measure(options, say=say), Output(given.out, given.json))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
