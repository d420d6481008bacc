"""Routing by agreement of votes that are already there: `capsfl_kernels.route_votes`."""
