"""`capsfl bench ledger` from the checkout.

python -m benchmarks.ledger [--quick] [--json] [--out FOLDER]
"""

import sys

from capsfl.cli import main

if __name__ == "__main__":
    main(["bench", "ledger", *sys.argv[1:]])
