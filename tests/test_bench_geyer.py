"""The table of Geyer et al.: what is trained at which epsilon, on MNIST-like files, and refusals."""

import gzip
import struct

import numpy as np
import pytest

from capsfl.bench import geyer, page
from capsfl.bench.machine import write_result
from capsfl.sweeps.classifier import ImageModelConfig


def write_idx(path, array: np.ndarray) -> None:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Files like MNIST's, with 240 images to train on and 60 to score on."""
    folder = tmp_path_factory.mktemp("mnist")
    generator = np.random.default_rng(0)
    for part, count in (("train", 240), ("t10k", 60)):
        labels = np.arange(count) % 10
        images = generator.integers(0, 60, (count, 28, 28)) + 15 * labels[:, None, None]
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"populations": (50,)}, "populations = 50: one of 100, 1000, 10000"),
        ({"seeds": 0}, "seeds = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(digits, options, message):
    with pytest.raises(ValueError, match=message):
        geyer.measure(geyer.GeyerBench(digits, **options), say=print)


@pytest.mark.parametrize(("population", "cohort", "delta"), [(100, 30, 1e-3), (1000, 100, 1e-5), (10000, 300, 1e-6)])
def test_settings_are_those_of_the_paper(tmp_path, population, cohort, delta):
    config = geyer.sweep_config(geyer.GeyerBench(tmp_path), population, "poisson", out=tmp_path)
    assert (config.privacy.cohort, config.privacy.delta) == (cohort, delta)
    assert config.sweep.target_epsilon == (8.0,)
    assert config.problem.model_dump()["split"] == "shards"
    assert config.problem.model_dump()["scored_on"] == "test"


@pytest.mark.journey
def test_both_samplings_cost_epsilon_8_and_fixed_sampling_needs_more_noise(digits, monkeypatch, tmp_path):
    small = geyer.SETTINGS[100]
    tiny = {**small.__dict__, "model": ImageModelConfig(kind="mlp", hidden=()), "pool": 4}
    monkeypatch.setattr(geyer, "SETTINGS", {100: geyer.Setting(**tiny)})
    said: list[str] = []
    result = geyer.measure(geyer.GeyerBench(digits, (100,), quick=True), say=said.append)
    poisson, fixed = result["rows"]
    assert (poisson["sampler"], fixed["sampler"]) == ("poisson", "fixed")
    assert "add" in poisson["relation"]
    assert "replace" in fixed["relation"]
    for row in result["rows"]:
        assert 7.9 < row["epsilon"] <= 8
        assert row["seeds"] == [100, 101]
        assert 0 <= row["accuracy"]["min"] <= row["accuracy"]["median"] <= row["accuracy"]["max"] <= 1
    assert fixed["noise_multiplier"] > 1.3 * poisson["noise_multiplier"]
    assert poisson["epsilon_fixed_replace_one"] > 10
    assert fixed["epsilon_fixed_replace_one"] == pytest.approx(fixed["epsilon"])
    assert (poisson["goal"], fixed["goal"]) == (0.78, None)
    assert len(said) == 2
    assert "| 100 | 30 | 0.001 | 2 | poisson, " in page.write_page(write_result(tmp_path, result).parent)
