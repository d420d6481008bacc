"""The base of every configuration section: strict, frozen, hashable, documented by its attributes."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen section of the configuration.

    Unknown keys, wrong types (a bool for an int, a string for a float) and non-finite numbers are refused;
    instances hash, so they serve as static arguments of jitted functions. Sequences are tuples and choices
    are `Literal`, for the same reason.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
