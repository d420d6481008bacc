"""The thirteen networks that the capsule network is compared with (Kumar et al. 2020, table IV).

config = parse_network({"name": "resnet50", "image_size": 64})
logits = build_network(config, rngs=nnx.Rngs(0))(images)
"""

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from flax import nnx
from pydantic import Field, TypeAdapter

from capsfl.models.zoo.alexnet import AlexNetConfig
from capsfl.models.zoo.densenet import DenseNetConfig
from capsfl.models.zoo.imagenet import load_imagenet
from capsfl.models.zoo.inception import InceptionConfig
from capsfl.models.zoo.mobilenet import MobileNetConfig
from capsfl.models.zoo.network import Network
from capsfl.models.zoo.resnet import ResNetConfig
from capsfl.models.zoo.vgg import VGGConfig
from capsfl.models.zoo.xception import XceptionConfig

ZooConfig = Annotated[
    VGGConfig | AlexNetConfig | XceptionConfig | ResNetConfig | InceptionConfig | MobileNetConfig | DenseNetConfig,
    Field(discriminator="name"),
]
"""A network of the zoo; the field `name` says which."""

CONFIGS = (VGGConfig, AlexNetConfig, XceptionConfig, ResNetConfig, InceptionConfig, MobileNetConfig, DenseNetConfig)
"""The families, in the order of table IV."""

NETWORKS: tuple[str, ...] = tuple(
    name for family in CONFIGS for name in get_args(family.model_fields["name"].annotation)
)
"""All presets, in the order of table IV."""

_ADAPTER: TypeAdapter[Any] = TypeAdapter(ZooConfig)

__all__ = ["CONFIGS", "NETWORKS", "Network", "ZooConfig", "build_network", "parse_network"]


def parse_network(fields: Mapping[str, Any]) -> Any:
    """Return the configuration that the fields ask for.

    Raises:
        pydantic.ValidationError: an unknown name, which lists the known ones, or a field that does not fit.
    """
    return _ADAPTER.validate_python(dict(fields))


def build_network(config: Any, *, rngs: nnx.Rngs, pretrained: bool = True) -> Network:
    """Build a network, and fill its body from the file that `config.weights` names, if any.

    Args:
        config: one of `ZooConfig`.
        rngs: draws the first weights.
        pretrained: False leaves the file alone, for a network that is about to be given weights of its own training.

    Returns:
        A module that maps images `(batch, side, side, channels)` in [-0.5, 0.5] to logits `(batch, classes)`.

    Raises:
        ValueError: the weights' file is missing, no file of weights, or of another network; names the first leaf.
    """
    network = Network(config, rngs=rngs)
    if config.weights and pretrained:
        load_imagenet(network.body, config)
    return network
