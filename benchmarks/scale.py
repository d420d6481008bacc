"""`capsfl bench scale` from the checkout.

python -m benchmarks.scale [--quick] [--chunk L] [--rounds N] [--json] [--out FOLDER]
"""

import sys

from capsfl.cli import main

if __name__ == "__main__":
    main(["bench", "scale", *sys.argv[1:]])
