"""`capsfl bench segmenters` from the checkout.

python -m benchmarks.segmenters --data FOLDER [--task lungs|tumours] [--quick] [--json]
"""

import sys

from capsfl.cli import main

if __name__ == "__main__":
    main(["bench", "segmenters", *sys.argv[1:]])
