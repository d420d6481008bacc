"""The learned fusion of planes: fitted to masks, kept with the run, refused where it makes no sense."""

import json

import numpy as np
import pytest

from capsfl.learning import fusion
from capsfl.learning.fusion import FILE, FusionError, fusion_to_json, learn_fusion, load_fusion
from capsfl.models.planes import fit_fusion

PLANES = ("xy", "xz")


def scans(count: int = 2):
    """Scans on which xy is right and xz says nothing of value; outside the body both are 0."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        truth = generator.random((4, 8, 8)) < 0.3
        body = np.zeros(truth.shape, bool)
        body[:, 2:6] = True
        truth &= body
        right = np.where(truth, 0.8, 0.2) + generator.normal(0, 0.1, truth.shape)
        yield {"xy": np.clip(right, 0.01, 1) * body, "xz": generator.uniform(0.01, 1, truth.shape) * body}, truth


def test_the_plane_that_is_right_gets_the_weight():
    weights = learn_fusion(scans(), PLANES, seed=0)
    assert weights[0] > 5 * abs(weights[1])
    for probabilities, truth in scans():
        fused = 1 / (1 + np.exp(-(weights[0] * probabilities["xy"] + weights[1] * probabilities["xz"] + weights[2])))
        assert ((fused > 0.5) & (probabilities["xy"] > 0) == truth).mean() > 0.98


def test_few_voxels_among_many_are_marked_where_that_agrees_best():
    generator = np.random.default_rng(1)
    truth = generator.random((10, 40, 40)) < 0.01
    said = np.clip(np.where(truth, 0.5, 0.3) + generator.normal(0, 0.07, truth.shape), 0.01, 1)
    weights = learn_fusion([({"xy": said}, truth)], ("xy",), seed=0)

    def dice(cut: float) -> float:
        marked = said > cut
        return 2 * (marked & truth).sum() / (marked.sum() + truth.sum())

    found = dice(-weights[1] / weights[0])
    assert found == pytest.approx(max(dice(cut) for cut in np.linspace(0.3, 0.6, 400)), abs=0.01)
    plain = fit_fusion(said[None], truth)
    assert found > dice(-plain[1] / plain[0]) + 0.02, "what 1/2 of the logistic regression would mark"


def test_voxels_outside_the_body_do_not_count():
    wide = [
        ({p: np.pad(v, [(0, 20)] * 3) for p, v in planes.items()}, np.pad(t, [(0, 20)] * 3)) for planes, t in scans()
    ]
    np.testing.assert_allclose(learn_fusion(wide, PLANES, seed=0), learn_fusion(scans(), PLANES, seed=0), rtol=1e-6)


def test_many_voxels_are_drawn_by_the_seed(monkeypatch):
    whole = learn_fusion(scans(6), PLANES, seed=0)
    monkeypatch.setattr(fusion, "MAX_VOXELS", 400)
    drawn = learn_fusion(scans(6), PLANES, seed=0)
    np.testing.assert_array_equal(drawn, learn_fusion(scans(6), PLANES, seed=0))
    assert not np.allclose(drawn, whole)
    assert drawn[0] == pytest.approx(whole[0], rel=0.5)


def test_the_rule_is_read_back_as_it_was_written(tmp_path):
    weights = np.array([3.25, -0.5, -1.75])
    record = fusion_to_json(weights, PLANES, ["A/p1"])
    assert record["fitted_on"] == ["A/p1"]
    (tmp_path / FILE).write_text(json.dumps(record))
    np.testing.assert_array_equal(load_fusion(tmp_path, PLANES), weights)
    with pytest.raises(FusionError, match=r"fusion\.json"):
        load_fusion(tmp_path, ("xy", "yz", "xz"))
    with pytest.raises(FusionError, match="weights of other planes than xy"):
        load_fusion(tmp_path, ("xy",))
    (tmp_path / FILE).write_text("{")
    with pytest.raises(FusionError, match="no usable weights"):
        load_fusion(tmp_path, PLANES)


def test_patients_that_teach_nothing_are_refused_with_the_remedy():
    with pytest.raises(FusionError, match=r"no validation patient has a mask.*data\.validation_fraction"):
        learn_fusion([], PLANES, seed=0)
    empty = [(planes, np.zeros_like(truth)) for planes, truth in scans()]
    with pytest.raises(FusionError, match=r"one class only.*choose mean, max or min"):
        learn_fusion(empty, PLANES, seed=0)
