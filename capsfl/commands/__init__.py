"""The commands of `capsfl`, one module each: a form of its options, and `run`, which takes the words after its name.

`run` returns the exit code and raises ValueError for what a user can mend. What is heavy (jax, orbax, matplotlib) is
imported in it once the words are understood, so that --help and mistakes answer at once; only the forms of `train`,
`sweep` and `phantom` are made of parts that need it earlier.
"""
