"""A trained study applied to new scans or pictures.

`run` is the road, `sources` finds what to predict, `model` answers.
"""
