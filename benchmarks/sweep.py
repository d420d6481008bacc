"""`capsfl bench sweep` from the checkout.

python -m benchmarks.sweep [--quick] [--runs N] [--json] [--out FOLDER]
"""

import sys

from capsfl.cli import main

if __name__ == "__main__":
    main(["bench", "sweep", *sys.argv[1:]])
