"""Convolutional capsules: `capsfl_kernels.conv_capsules`."""
