"""The networks a classifier can be, by name; what each one answers, and the loss that suits the answer.

A capsule network answers by the lengths of its class capsules and learns by the margin loss; any other by logits, and
learns by cross-entropy.
"""

from pathlib import Path
from typing import Annotated, Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from pydantic import Discriminator, Tag

from capsfl.learning.losses import cross_entropy, margin_loss, reconstruction_loss
from capsfl.models import zoo
from capsfl.models.capsnet import CapsNet, CapsNetConfig, CapsNetOutput
from capsfl.models.efficient_capsnet import EfficientCapsNet, EfficientCapsNetConfig
from capsfl.models.published import load_capsnet
from capsfl.models.zoo.alexnet import AlexNetConfig
from capsfl.models.zoo.densenet import DenseNetConfig
from capsfl.models.zoo.inception import InceptionConfig
from capsfl.models.zoo.mobilenet import MobileNetConfig
from capsfl.models.zoo.network import Network
from capsfl.models.zoo.resnet import ResNetConfig
from capsfl.models.zoo.vgg import VGGConfig
from capsfl.models.zoo.xception import XceptionConfig

Answer = CapsNetOutput | Array
"""What a network says about a batch: capsules, or logits `(batch, classes)`."""

CONFIGS = (CapsNetConfig, EfficientCapsNetConfig, *zoo.CONFIGS)
NAMES = {name: f"<{form.__name__}>" for form in CONFIGS for name in get_args(form.model_fields["name"].annotation)}
"""Every name that `model.name` can have, and the tag of its section; `explain` leaves out what is in brackets."""


def _section(value: Any) -> str | None:
    """The section that a table or a value is of; a table without a name is a CapsNet's."""
    name = value.get("name", "capsnet") if isinstance(value, dict) else getattr(value, "name", None)
    return NAMES.get(name) if isinstance(name, str) else None


NetworkConfig = Annotated[
    Annotated[CapsNetConfig, Tag("<CapsNetConfig>")]
    | Annotated[EfficientCapsNetConfig, Tag("<EfficientCapsNetConfig>")]
    | Annotated[VGGConfig, Tag("<VGGConfig>")]
    | Annotated[AlexNetConfig, Tag("<AlexNetConfig>")]
    | Annotated[XceptionConfig, Tag("<XceptionConfig>")]
    | Annotated[ResNetConfig, Tag("<ResNetConfig>")]
    | Annotated[InceptionConfig, Tag("<InceptionConfig>")]
    | Annotated[MobileNetConfig, Tag("<MobileNetConfig>")]
    | Annotated[DenseNetConfig, Tag("<DenseNetConfig>")],
    Discriminator(
        _section,
        custom_error_type="unknown_network",
        custom_error_message="unknown network; its name is one of " + ", ".join(NAMES),
    ),
]


def named_network(name: str) -> NetworkConfig | dict[str, str]:
    """Returns the configuration that a name alone stands for; of an unknown one a table that validation refuses."""
    presets = {"capsnet": CapsNetConfig.ct(), "efficient_capsnet": EfficientCapsNetConfig.ct()}
    return presets.get(name, {"name": name})


def make_network(config: NetworkConfig, *, rngs: nnx.Rngs, pretrained: bool = True) -> nnx.Module:
    """Builds the network of a configuration.

    Args:
        config: which network; `weights` names a file to start from.
        rngs: draws the weights that no file gives.
        pretrained: False leaves the file alone, for a network that is about to be given weights of its own training.

    Raises:
        ValueError: the file is missing or of another network.
    """
    if isinstance(config, CapsNetConfig):
        model = CapsNet(config, rngs=rngs)
        if config.weights and pretrained:
            load_capsnet(model, Path(config.weights))
        return model
    if isinstance(config, EfficientCapsNetConfig):
        return EfficientCapsNet(config, rngs=rngs)
    return zoo.build_network(config, rngs=rngs, pretrained=pretrained)


def ask(model: Any, images: Array, labels: Array | None = None) -> Answer:
    """Shows images to a network.

    Args:
        model: as `make_network` builds it.
        images: `(batch, side, side, 1)` intensities in [0, 1]; a network of more channels sees the same in each.
        labels: `(batch,)`, in training: which capsule a decoder sees.
    """
    images = jnp.repeat(images, model.image_shape[-1], axis=-1)
    if isinstance(model, CapsNet | EfficientCapsNet):
        return model(images, labels)
    return model(images - 0.5)


def class_evidence(answer: Answer) -> Array:
    """Returns `(batch, classes)` evidence in [0, 1], largest for the class that the network names.

    Lengths of class capsules, which need not sum to one, or the softmax of logits.
    """
    return answer.lengths if isinstance(answer, CapsNetOutput) else jax.nn.softmax(answer, axis=-1)


def class_probabilities(answer: Answer) -> Array:
    """Returns `(batch, classes)` probabilities; those of capsules are their shares of the summed lengths."""
    evidence = class_evidence(answer)
    return evidence / jnp.maximum(jnp.sum(evidence, axis=-1, keepdims=True), 1e-9)


def classification_loss(answer: Answer, images: Array, labels: Array, weights: Array | None = None) -> Array:
    """Returns margin loss plus reconstruction loss of capsules, cross-entropy of logits.

    Args:
        answer: what the network says about the images.
        images: `(batch, side, side, 1)` intensities in [0, 1].
        labels: `(batch,)` integer classes.
        weights: `(batch,)` weight of each example, or None for equal weights.

    Returns:
        The mean over examples.
    """
    if not isinstance(answer, CapsNetOutput):
        return cross_entropy(answer, labels, weights)
    loss = margin_loss(answer.lengths, labels, weights)
    if answer.reconstruction is not None:
        loss += reconstruction_loss(answer.reconstruction, images, weights)
    return loss


def features(model: Any, images: Array) -> Array:
    """Returns `(batch, features)`: what the network's last layer sees, or its class capsules laid end to end."""
    if isinstance(model, Network):
        return model.features(jnp.repeat(images, model.image_shape[-1], axis=-1) - 0.5)
    answer = ask(model, images)
    assert isinstance(answer, CapsNetOutput)
    return answer.capsules.reshape(len(images), -1)
