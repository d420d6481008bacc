"""A network of the zoo: a convolutional body of one family and the head that all families share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from capsfl.models.zoo.alexnet import AlexNet, AlexNetConfig
from capsfl.models.zoo.config import NetworkConfig
from capsfl.models.zoo.densenet import DenseNet, DenseNetConfig
from capsfl.models.zoo.imagenet import input_transform
from capsfl.models.zoo.inception import Inception, InceptionConfig
from capsfl.models.zoo.layers import Dense
from capsfl.models.zoo.mobilenet import MobileNet, MobileNetConfig, MobileNetV2
from capsfl.models.zoo.resnet import ResNet, ResNetConfig
from capsfl.models.zoo.vgg import VGG, VGGConfig
from capsfl.models.zoo.xception import Xception, XceptionConfig

Body = VGG | AlexNet | Xception | ResNet | Inception | MobileNet | MobileNetV2 | DenseNet


class Network(nnx.Module):
    """Features of every position, their mean, one hidden layer, one logit per class."""

    def __init__(self, config: NetworkConfig, *, rngs: nnx.Rngs) -> None:
        self.image_shape = (config.image_size, config.image_size, config.in_channels)
        # Published weights expect other intensities than the window's.
        transform = input_transform(str(getattr(config, "name", "")), config.in_channels) if config.weights else None
        self.input_transform = nnx.static(transform)
        self.body = _make_body(config, rngs)
        self.hidden = Dense("hidden", self.body.out_channels, config.hidden, rngs=rngs)
        self.logits = Dense("logits", config.hidden, config.classes, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Classify images.

        Batch normalisation takes the statistics of the batch and gathers them, or, after `eval()`, those gathered.

        Args:
            images: `(batch, image_size, image_size, in_channels)`, window intensities in [-0.5, 0.5].

        Returns:
            Logits `(batch, classes)`.

        Raises:
            ValueError: if the shapes do not fit the configuration.
        """
        return self.logits(self.features(images))

    def features(self, images: Array) -> Array:
        """Return what the logits are made of, `(batch, hidden)`; arguments and errors as in a call."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images {images.shape}: expected {('batch', *self.image_shape)}")
        if self.input_transform is not None:
            scale, offset = (jnp.asarray(row, images.dtype).reshape(1, 1, 1, -1) for row in self.input_transform)
            images = images * scale + offset
        return jax.nn.relu(self.hidden(jnp.mean(self.body(images), axis=(1, 2))))


def _make_body(config: NetworkConfig, rngs: nnx.Rngs) -> Body:
    match config:
        case VGGConfig():
            return VGG(config, rngs=rngs)
        case AlexNetConfig():
            return AlexNet(config, rngs=rngs)
        case XceptionConfig():
            return Xception(config, rngs=rngs)
        case ResNetConfig():
            return ResNet(config, rngs=rngs)
        case InceptionConfig():
            return Inception(config, rngs=rngs)
        case MobileNetConfig(name="mobilenet"):
            return MobileNet(config, rngs=rngs)
        case MobileNetConfig():
            return MobileNetV2(config, rngs=rngs)
        case DenseNetConfig():
            return DenseNet(config, rngs=rngs)
    raise TypeError(f"{type(config).__name__} is no configuration of the zoo")
