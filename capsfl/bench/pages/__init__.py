"""The sections of the benchmarks' page, one module a benchmark: how to read its figures, and its tables of them.

They import the standard library alone, so that the page can be written where only one benchmark's needs are installed.
"""
