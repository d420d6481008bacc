"""One training of a study, in the order of its life.

`run` says what it is, `checks` what is refused before it begins, `founding` what it owns from its first start on,
`stages` takes it from patients to results, `rounds` through one stage.
"""
