"""A trained study applied to new scans; `run` is the road, `scans` finds what to predict, `model` answers."""
