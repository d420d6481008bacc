"""Measurements of the capsule operators and of whole networks: `capsfl bench`.

The operator benchmark needs jax and numpy alone, so that it runs on an accelerator host from the checkout.
"""

BENCHMARKS = {
    "routing": "every capsule operator: time, memory, part of the device's roof; torch beside it",
    "rounds": "one round of 100 hospitals: every chunk L; torch, pfl, FedJAX and Flower beside it",
    "scale": "rounds over 1e2 to 1e5 hospitals on disk: time and memory against cohort and population",
    "segcaps": "one training step of SegCaps R3 with reconstruction; data-parallel forms agree",
    "sweep": "64 studies as one program, against 64 processes and 64 calls of one compiled program",
    "ledger": "rounds recorded and verified, by their owner alone and by eight members",
    "ingest": "DICOM series to standard volumes: slices a second and memory; MONAI and SimpleITK beside it",
    "mnist": "test error of capsule networks on MNIST over seeds, and on affine-distorted digits",
    "segmenters": "SegCaps, U-Net and U-Net++ with the same budget on lungs or tumours; masks side by side",
    "geyer": "MNIST over 100, 1,000 and 10,000 hospitals at epsilon 8, after Geyer et al. 2017",
}
