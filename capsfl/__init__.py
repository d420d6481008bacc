"""Capsule networks for lung CT, trained federated with differential privacy, in JAX.

Start at `capsfl.train` for the whole road, `capsfl.federated.federate` for a model and arrays of your own, and
`capsfl_kernels` for the capsule operators alone.
"""
