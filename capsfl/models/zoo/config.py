"""What the networks of the zoo are asked for: input, classes, head and normalisation."""

from typing import Annotated, Literal

from pydantic import Field

from capsfl.settings import Settings


class NetworkConfig(Settings):
    """What all networks of the zoo have in common; each family adds its `name`, the preset."""

    image_size: Annotated[int, Field(gt=0)] = 96
    """Height and width of the image in pixels; every network has a smallest one."""

    in_channels: Literal[1, 3] = 1
    """Channels of the image."""

    classes: Annotated[int, Field(ge=2)] = 2
    """Number of classes, one logit each."""

    hidden: Annotated[int, Field(gt=0)] = 256
    """Hidden units of the head, between the mean over all positions and the logits."""

    norm: Literal["batch", "group"] = "batch"
    """What normalises the features. Batch normalisation is published; its statistics tie the examples of a batch to
    each other, which clipping by patient does not allow, and cross hospitals by the rounds' `batch_norm`."""

    batch_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the running statistics that a training step keeps. Keras keeps 0.99, which takes the thousands of
    steps on ImageNet to settle; the few hundred of a federated run would end near the first values."""

    weights: str = ""
    """File of weights in the layout of Keras (`..._notop.h5`, `.weights.h5`), such as those it publishes for
    ImageNet; empty to start from random ones. The head starts afresh."""

    def check(self, smallest: int) -> None:
        """Refuse an image that the network would reduce to nothing, and weights that it has no place for.

        Raises:
            ValueError: with the smallest side, or the normalisation that the weights were made with.
        """
        name = getattr(self, "name", "the network")
        if self.image_size < smallest:
            raise ValueError(f"image_size {self.image_size}: {name} needs images of at least {smallest} pixels a side")
        published = type(self).model_fields["norm"].default
        if self.weights and self.norm != published:
            raise ValueError(
                f'norm "{self.norm}": weights of Keras\'s {name} are made with norm = "{published}"; set it'
            )
