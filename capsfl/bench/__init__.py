"""Measurements of the capsule operators and of whole networks: `capsfl bench`.

The operator benchmark needs jax and numpy alone, so that it runs on an accelerator host from the checkout.
"""

BENCHMARKS = {
    "routing": "every capsule operator: time, memory, part of the device's roof; torch beside it",
    "segcaps": "one training step of SegCaps R3 with reconstruction; data-parallel forms agree",
}
