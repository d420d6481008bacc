"""`capsfl bench segcaps` from the checkout.

python -m benchmarks.segcaps [--quick] [--out FOLDER]
"""

import sys

from capsfl.cli import main

if __name__ == "__main__":
    main(["bench", "segcaps", *sys.argv[1:]])
