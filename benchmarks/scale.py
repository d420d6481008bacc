"""`capsfl bench scale` from the checkout.

python -m benchmarks.scale [--quick] [--chunk L] [--rounds N] [--json] [--out FOLDER]
"""

import argparse
import json
from pathlib import Path

from capsfl.bench.command import say
from capsfl.bench.machine import results_folder, write_result
from capsfl.bench.scale import ScaleBench, measure


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small populations and cohorts")
    parser.add_argument("--chunk", type=int, default=1, help="hospitals vmapped at once")
    parser.add_argument("--rounds", type=int, default=5, help="rounds timed at every point")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="folder for the result")
    given = parser.parse_args()
    try:
        folder = results_folder(given.out)
        result = measure(ScaleBench(given.quick, given.chunk, given.rounds), say=say)
    except ValueError as error:
        parser.error(str(error))
    path = write_result(folder, result)
    print(json.dumps(result) if given.json else f"written: {path}")


if __name__ == "__main__":
    main()
