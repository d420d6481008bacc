"""The networks that segmentation can train, by name: all are called as SegCaps is and answer as it does."""

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from flax import nnx
from pydantic import Discriminator, Tag

from capsfl.models.published import load_segcaps
from capsfl.models.segcaps import SegCaps, SegCapsConfig
from capsfl.models.unet import UNet, UNetConfig, UNetPlusPlus, UNetPlusPlusConfig

NAMES = {"segcaps": "SegCapsConfig", "unet": "UNetConfig", "unet++": "UNetPlusPlusConfig"}
"""Every name that `segmentation.model.name` can have, and the section that it belongs to."""


def _section(value: Any) -> str | None:
    """The section that a table or a value is of; a table without a name is SegCaps'."""
    name = value.get("name", "segcaps") if isinstance(value, dict) else getattr(value, "name", None)
    return NAMES.get(name) if isinstance(name, str) else None


SegmenterConfig: TypeAlias = Annotated[
    Annotated[SegCapsConfig, Tag("<SegCapsConfig>")]
    | Annotated[UNetConfig, Tag("<UNetConfig>")]
    | Annotated[UNetPlusPlusConfig, Tag("<UNetPlusPlusConfig>")],
    Discriminator(
        lambda value: (section := _section(value)) and f"<{section}>",
        custom_error_type="unknown_network",
        custom_error_message="unknown network; its name is one of " + ", ".join(NAMES),
    ),
]


def make_segmenter(config: SegmenterConfig, *, rngs: nnx.Rngs, pretrained: bool = True) -> nnx.Module:
    """Builds the network of a configuration.

    Args:
        config: which network; `weights` of SegCaps names a file to start from.
        rngs: draws the weights that no file gives.
        pretrained: False leaves the file alone, for a network that is about to be given weights of its own training.

    Returns:
        A module `(images (batch, height, width, in_channels), truth or None) -> SegCapsOutput`.
    """
    if isinstance(config, UNetConfig):
        return UNet(config, rngs=rngs)
    if isinstance(config, UNetPlusPlusConfig):
        return UNetPlusPlus(config, rngs=rngs)
    model = SegCaps(config, rngs=rngs)
    if config.weights and pretrained:
        load_segcaps(model, Path(config.weights))
    return model
