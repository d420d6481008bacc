"""`capsfl bench geyer` from the checkout.

python -m benchmarks.geyer --data MNIST [--populations 100 1000] [--seeds N] [--quick] [--json] [--out FOLDER]
"""

import sys

from capsfl.cli import main

if __name__ == "__main__":
    main(["bench", "geyer", *sys.argv[1:]])
