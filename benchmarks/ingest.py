"""`capsfl bench ingest` from the checkout.

python -m benchmarks.ingest [--quick] [--json] [--out FOLDER]
"""

import sys

from capsfl.cli import main

if __name__ == "__main__":
    main(["bench", "ingest", *sys.argv[1:]])
