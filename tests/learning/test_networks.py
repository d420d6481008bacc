"""The loss follows the network; every answer becomes probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsfl.learning import networks
from capsfl.learning.classification import ClassificationConfig, Classifier, make_classification_task
from capsfl.learning.losses import margin_loss, reconstruction_loss
from capsfl.models.capsnet import CapsNetConfig, CapsNetOutput
from capsfl.models.zoo import NETWORKS
from capsfl.models.zoo.alexnet import AlexNetConfig

IMAGES = jax.random.uniform(jax.random.key(0), (4, 64, 64, 1))
LABELS = jnp.array([0, 1, 2, 1])


def test_every_network_of_the_zoo_has_its_name():
    assert set(networks.NAMES) == {"capsnet", "efficient_capsnet", *NETWORKS}


def test_capsules_learn_by_margin_and_reconstruction_logits_by_cross_entropy():
    lengths = jnp.array([[0.9, 0.2, 0.1], [0.3, 0.3, 0.3], [0.0, 0.5, 0.9], [0.1, 0.2, 0.3]])
    weights = jnp.array([1.0, 0.0, 2.0, 1.0])
    capsules = CapsNetOutput(jnp.zeros((4, 3, 2)), lengths, IMAGES * 0.5)
    found = networks.classification_loss(capsules, IMAGES, LABELS, weights)
    expected = margin_loss(lengths, LABELS, weights) + reconstruction_loss(IMAGES * 0.5, IMAGES, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    logits = jnp.log(lengths + 0.1)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    found = networks.classification_loss(logits, IMAGES, LABELS, weights)
    np.testing.assert_allclose(found, jnp.sum(each * weights) / 4, rtol=1e-6)


def test_probabilities_sum_to_one_and_name_the_class_with_most_evidence():
    lengths = jnp.array([[0.9, 0.3, 0.3]])
    found = networks.class_probabilities(CapsNetOutput(jnp.zeros((1, 3, 2)), lengths, None))
    np.testing.assert_allclose(found, [[0.6, 0.2, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(networks.class_probabilities(jnp.log(lengths)), [[0.6, 0.2, 0.2]], rtol=1e-6)


def test_a_network_of_three_channels_sees_the_same_grey_in_each_around_zero():
    model = networks.make_network(AlexNetConfig(image_size=64, in_channels=3), rngs=nnx.Rngs(0))

    @jax.jit
    def both(images: jax.Array) -> tuple[networks.Answer, jax.Array]:
        return networks.ask(model, images), model(jnp.repeat(images, 3, axis=-1) - 0.5)  # type: ignore[operator]

    np.testing.assert_allclose(*both(IMAGES[:1]), rtol=1e-5)


@pytest.mark.parametrize("model", [CapsNetConfig.ct(image_size=32), AlexNetConfig(image_size=64)], ids=lambda m: m.name)
def test_a_task_of_three_classes_scores_each_and_its_classifier_fills_the_last_batch(model):
    config = ClassificationConfig(model=model, classes=3, class_weights=(1.0, 2.0, 0.0), top_slices=2)
    task = make_classification_task(config, seed=0)
    images = np.asarray(jax.image.resize(IMAGES, (4, config.side, config.side, 1), "linear"))
    batch = {"image": images, "label": np.asarray(LABELS)}

    @jax.jit
    def judged(batch: dict) -> tuple:
        return task.loss(task.parameters, batch), task.scores(task.parameters, batch, jnp.array([1.0, 1.0, 1.0, 0.0]))

    loss, scores = judged(batch)
    assert scores.keys() == {"accuracy", "sensitivity", "specificity", *(f"sensitivity_{k}" for k in range(3))}
    assert [float(scores[f"sensitivity_{k}"][1]) for k in range(3)] == [1, 1, 1]
    # The third class weighs nothing, so that its image doesn't matter.
    blank = images * np.array([1, 1, 0, 1], np.float32)[:, None, None, None]
    np.testing.assert_allclose(judged(batch | {"image": blank})[0], loss, rtol=1e-6)
    classifier = Classifier(task, config)
    alone = classifier.probabilities(task.parameters, images[:1])
    together = classifier.probabilities(task.parameters, np.concatenate([images] * 5))
    assert together.shape == (20, 3)
    np.testing.assert_allclose(together[16], alone[0], rtol=1e-4)
    np.testing.assert_allclose(together.sum(axis=1), 1, rtol=1e-5)
    most_ill = together[np.argsort(together[:, 0])[:2]]
    np.testing.assert_allclose(classifier.judge(together), most_ill.mean(axis=0))
