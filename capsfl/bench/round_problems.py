"""What the hospitals of `capsfl bench rounds` train: the comparison's network, SegCaps or CapsNet."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from capsfl.bench import round_peers
from capsfl.federated.hospitals import Hospitals, stack_hospitals
from capsfl.federated.local import LocalConfig
from capsfl.learning.losses import margin_loss, segmentation_loss
from capsfl.learning.tasks import Task, make_task
from capsfl.models.capsnet import CapsNet, CapsNetConfig
from capsfl.models.convolution import max_pool
from capsfl.models.layers import Conv
from capsfl.models.segcaps import SegCaps, SegCapsConfig


class Network(nnx.Module):
    """Two convolutions with pooling and two dense layers, from the weights that every framework starts with."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.convolutions = nnx.List([Conv(1, 16, 3, rngs=rngs), Conv(16, 32, 3, rngs=rngs)])
        self.layers = nnx.List([nnx.Linear(1568, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)])
        for layer, kernel in zip((*self.convolutions, *self.layers), round_peers.draw_kernels(), strict=True):
            layer.kernel[...] = jnp.asarray(kernel)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `(batch, 28, 28, 1)` to logits `(batch, 10)`."""
        for convolution in self.convolutions:
            images = max_pool(nnx.relu(convolution(images)))
        return self.layers[1](nnx.relu(self.layers[0](images.reshape(images.shape[0], -1))))


@dataclass(frozen=True)
class Problem:
    """What the hospitals train, and what one of their local steps costs."""

    task: Task
    hospitals: Hospitals
    local: LocalConfig


def make_problem(model: str) -> Problem:
    """Builds the model's task and draws its hospitals."""
    if model == "segcaps":
        return segcaps_problem()
    images, labels = round_peers.draw_records()
    if model == "cnn":

        def loss(network: Network, batch: Mapping[str, jax.Array]) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(network(batch["image"]), batch["label"]).mean()

        task, count = make_task("rounds", Network(), loss), round_peers.HOSPITALS
    else:
        config = CapsNetConfig(
            image_size=28, classes=10, conv_channels=16, primary_capsules=4, digit_dim=8, reconstruction=False
        )

        def margin(network: CapsNet, batch: Mapping[str, jax.Array]) -> jax.Array:
            return margin_loss(network(batch["image"]).lengths, batch["label"])

        task, count = make_task("rounds", CapsNet(config, rngs=nnx.Rngs(0)), margin), 20
    records = {f"hospital {h}": {"image": images[h], "label": labels[h]} for h in range(count)}
    return Problem(task, stack_hospitals(records), _local(round_peers.BATCH))


def count_flops() -> int:
    """Multiplications and additions of a round's convolutions and dense layers, nothing else.

    A layer counts once forward, once for its kernel's gradient, and once for its input's where that is needed:
    not in the first layer.
    """
    pixels, halved = 28 * 28, 14 * 14
    layers = (2 * pixels * 9 * 1 * 16, 2 * halved * 9 * 16 * 32, 2 * 1568 * 16, 2 * 16 * 10)
    image = 3 * sum(layers) - layers[0]
    return image * round_peers.HOSPITALS * round_peers.RECORDS


def segcaps_problem(*, width: float = 0.25) -> Problem:
    """Eight hospitals of eight images with a brighter disc, for a share of SegCaps R3's width."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    records = {}
    for hospital in range(8):
        centres = generator.uniform(8, 24, (8, 2, 1, 1))
        discs = ((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < 36).astype(np.float32)
        images = 0.5 * discs - 0.25 + generator.normal(0, 0.1, discs.shape).astype(np.float32)
        records[f"hospital {hospital}"] = {"image": images[..., None].astype(np.float32), "mask": discs}

    def loss(network: SegCaps, batch: Mapping[str, jax.Array]) -> jax.Array:
        images, truth = batch["image"], batch["mask"]
        return segmentation_loss(network(images, truth), images, truth)

    task = make_task("rounds", SegCaps(SegCapsConfig(width=width), rngs=nnx.Rngs(0)), loss)
    return Problem(task, stack_hospitals(records), _local(2))


def _local(batch: int) -> LocalConfig:
    return LocalConfig(optimizer="sgd", learning_rate=round_peers.RATE, batch_size=batch, shuffle=False)
