"""`capsfl bench mnist` from the checkout.

python -m benchmarks.mnist --config configs/mnist_efficient.toml --data MNIST [--affine] [--quick] [--json]
"""

import sys

from capsfl.cli import main

if __name__ == "__main__":
    main(["bench", "mnist", *sys.argv[1:]])
