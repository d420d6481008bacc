"""`capsfl bench rounds` from the checkout.

python -m benchmarks.rounds [--model cnn|segcaps|capsnet] [--quick] [--json] [--out FOLDER]
"""

import sys

from capsfl.cli import main

if __name__ == "__main__":
    main(["bench", "rounds", *sys.argv[1:]])
