"""What a synthetic chest must look like to a scanner, an eye and a classifier."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.ct.phantom import SCANNERS, Anatomy, Geometry, acquire, patient
from capsfl.ct.phantom.chest import airways
from capsfl.ct.phantom.lesions import lesion_center
from capsfl.ct.phantom.shapes import Grid, SmoothField, coverage, smooth_minimum, superellipse
from capsfl.ct.phantom.thorax import Thorax
from capsfl.ct.phantom.vessels import SMALLEST_MM, draw_vessels, grow_vessels

SCANNER = {scanner.id: scanner for scanner in SCANNERS}


@pytest.fixture(scope="module")
def positive() -> Anatomy:
    return patient(3, positive=True)


@pytest.fixture(scope="module")
def scan(positive):
    return acquire(positive, SCANNER["A1"], matrix=128, seed=1)


def at(geometry: Geometry, point: tuple[float, float, float]) -> tuple[int, int, int]:
    """Array indices of the voxel nearest to a point in LPS mm."""
    k, j, i = np.rint(np.linalg.solve(geometry.affine, [*point, 1])[:3]).astype(int)
    return k, j, i


def around(hu: np.ndarray, geometry: Geometry, anatomy: Anatomy, x: float, y: float, z: float) -> float:
    """Mean HU of the 3 x 3 voxels around a point of the patient's frame."""
    grid = Grid(128, 1.0, anatomy.center_x, anatomy.center_y, anatomy.tilt_degrees)
    u, v = (float(c) for c in grid.to_image(x, y))
    k, j, i = at(geometry, (u, v, z))
    return float(hu[k, j - 1 : j + 2, i - 1 : i + 2].mean())


def test_the_same_seed_gives_the_same_patient_and_scan(positive, scan):
    again = acquire(patient(3, positive=True), SCANNER["A1"], matrix=128, seed=1)
    for first, second in zip(scan[:3], again[:3], strict=True):
        np.testing.assert_array_equal(first, second)
    assert scan[3] == again[3]
    assert patient(4, positive=True) != positive


def test_a_slab_does_not_depend_on_the_slabs_cut_before_it(positive):
    fresh, used = (Thorax(positive, matrix=128, field_of_view_mm=360) for _ in range(2))
    used.slab(40.0, 5.0)
    for a, b in zip(fresh.slab(0.0, 5.0), used.slab(0.0, 5.0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tissues_have_their_hounsfield_units(positive, scan):
    hu, lung, lesion, geometry = scan
    s, ap = positive.size, positive.depth
    offset = SCANNER["A1"].offset_hu
    air = hu[:, 6:14, 50:78]  # in front of the patient
    assert air.mean() == pytest.approx(-1000 + offset, abs=8)
    healthy = hu[lung & ~lesion]
    assert -870 < np.median(healthy) < -740
    assert np.median(hu[lesion]) > np.median(healthy) + 100
    heart_z = positive.base_z + 46
    assert around(hu, geometry, positive, 21 * s, -30 * ap, heart_z) == pytest.approx(46 + offset, abs=25)
    assert around(hu, geometry, positive, -60 * s, 0, positive.base_z) == pytest.approx(58 + offset, abs=30)
    ((cx, cy, _),) = airways(positive, 60.0)
    assert around(hu, geometry, positive, cx, cy, 60) < -900
    ring = hu[len(hu) // 2]
    assert (ring > 300).sum() > 40  # ribs, spine, sternum
    assert hu.max() < 1500


def test_lung_volume_is_that_of_an_adult_in_litres(scan):
    _, lung, _, geometry = scan
    assert 3 < lung.sum() * np.prod(geometry.spacing_mm) / 1e6 < 8


def test_the_liver_lies_on_the_patients_right_and_the_heart_reaches_left(positive, scan):
    hu, _, _, geometry = scan
    s, ap = positive.size, positive.depth
    # 3 mm above the middle of both domes' tops: liver on the right, still lung on the left.
    z = positive.base_z + positive.dome_mm + 3
    assert around(hu, geometry, positive, -66 * s, 0, z) > 0
    assert around(hu, geometry, positive, 70 * s, 0, z) < -600
    z = positive.base_z + 46
    assert around(hu, geometry, positive, 60 * s, -40 * ap, z) > 0
    assert around(hu, geometry, positive, -60 * s, -40 * ap, z) < -600


def test_positives_have_lesions_inside_their_lungs_and_negatives_have_none(scan):
    _, lung, lesion, geometry = scan
    assert lesion.sum() * np.prod(geometry.spacing_mm) > 20_000  # mm^3
    assert not (lesion & ~lung).any()
    _, _, none, _ = acquire(patient(3, positive=False), SCANNER["B4"], matrix=128, seed=1)
    assert not none.any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**64 - 1))
def test_lesions_are_centred_inside_the_chest_wall(seed):
    anatomy = patient(seed, positive=True)
    assert 10 <= len(anatomy.lesions) < 24
    for lesion in anatomy.lesions:
        x, y, z = lesion_center(anatomy, lesion)
        assert np.sign(x) == lesion.side or abs(x) < 40
        assert abs(x) < 150
        assert abs(y) < 120
        assert anatomy.base_z < z < anatomy.apex_z


def dense_fraction(anatomy: Anatomy, scanner: str = "B3") -> float:
    hu, lung, _, _ = acquire(anatomy, SCANNER[scanner], matrix=128, slice_thickness_mm=10.0, seed=2)
    return float((hu[lung] > -650).mean())


def test_confounders_make_negative_lungs_denser_without_entering_the_mask():
    negative = next(
        anatomy
        for anatomy in (patient(seed, positive=False) for seed in range(50))
        if anatomy.confounders.dependent_mm and anatomy.confounders.oedema and anatomy.confounders.bands
    )
    healthy = replace(negative.confounders, dependent_mm=0.0, bands=(), oedema=0.0)
    assert dense_fraction(negative) > dense_fraction(replace(negative, confounders=healthy)) + 0.02


def test_most_negatives_carry_a_confounder_and_some_carry_none():
    seen = [patient(seed, positive=False).confounders for seed in range(200)]
    clear = [not (c.dependent_mm or c.bands or c.oedema) for c in seen]
    assert 0.02 < np.mean(clear) < 0.25


def test_the_dense_lung_fraction_alone_neither_solves_nor_reverses_the_task():
    names = ("A1", "A2", "B3", "B4", "C5", "C6")
    scores = {
        label: np.array([dense_fraction(patient(100 + n, positive=label), names[n % 6]) for n in range(12)])
        for label in (True, False)
    }
    area = (scores[True][:, None] > scores[False][None, :]).mean()
    assert 0.3 < area < 0.98


@pytest.mark.parametrize("scanner", SCANNERS, ids=lambda scanner: scanner.id)
def test_each_scanner_pads_outside_its_circle_and_keeps_its_noise_level(scanner):
    anatomy = patient(9, positive=False)
    hu, _, _, geometry = acquire(anatomy, scanner, matrix=256, slice_thickness_mm=10.0, seed=4)
    axis = geometry.origin_mm[0] + np.arange(256) * geometry.spacing_mm[2]
    radius = np.hypot(axis[:, None], axis[None, :])
    outside = radius > scanner.field_of_view_mm / 2 + 1
    assert (hu[:, outside] == scanner.padding_hu).all()
    assert hu[:, radius < scanner.field_of_view_mm / 2 - 1].min() >= scanner.minimum_hu
    assert geometry.spacing_mm[1] == pytest.approx(scanner.field_of_view_mm / 256)
    # The heart is uniform: its spread is noise, .45 to 1.2 of the scanner's scale by the tissue around it.
    k, j, i = at(geometry, (21.0 + anatomy.center_x, -30.0 + anatomy.center_y, anatomy.base_z + 46))
    assert 0.6 * scanner.noise_hu < hu[k, j - 8 : j + 9, i - 8 : i + 9].std() < 1.35 * scanner.noise_hu


def test_thin_slices_average_to_the_thick_slab(positive):
    thorax = Thorax(positive, matrix=128, field_of_view_mm=360)
    z = 8.0
    thick, lung, _ = thorax.slab(z, 5.0)
    offsets = (np.arange(15) - 7) / 3
    thin = np.mean([thorax.slab(z + offset, 1 / 3)[0] for offset in offsets], axis=0)
    difference = np.abs(thick - thin)
    assert difference.mean() < 15
    assert difference[lung].mean() < 25


def test_a_build_does_not_depend_on_the_disease():
    covid, other = patient(21, positive=True), patient(21, positive=True, pattern="pneumonia")
    assert replace(other, lesions=covid.lesions, confounders=covid.confounders) == covid
    assert other.lesions != covid.lesions


def spread(anatomy: Anatomy) -> tuple[float, float, float]:
    """Weighed by volume: the share of the opacities on their main side, their depth (mm) and their density."""
    weights = np.array([lesion.radius_mm**3 for lesion in anatomy.lesions])
    right = np.average([lesion.side < 0 for lesion in anatomy.lesions], weights=weights)
    depth = np.average([lesion.depth_mm for lesion in anatomy.lesions], weights=weights)
    density = np.average([lesion.opacity for lesion in anatomy.lesions], weights=weights)
    return max(right, 1 - right), float(depth), float(density)


def test_another_pneumonia_is_of_one_lung_central_dense_and_effuses_where_covid_does_not():
    patterns: dict[str, list[Anatomy]] = {
        pattern: [patient(seed, positive=True, pattern=pattern) for seed in range(120)]
        for pattern in ("covid", "pneumonia")
    }
    one_sided, depth, density = (
        {pattern: np.array([spread(anatomy)[k] for anatomy in found]) for pattern, found in patterns.items()}
        for k in range(3)
    )
    assert np.mean(one_sided["pneumonia"] > 0.95) > 0.5
    assert np.mean(one_sided["covid"] > 0.95) < 0.1
    assert np.median(depth["pneumonia"]) > 1.2 * np.median(depth["covid"])
    assert np.median(density["pneumonia"]) > np.median(density["covid"]) + 0.15
    effusion = {
        pattern: np.mean([anatomy.confounders.dependent_opacity == 0.97 for anatomy in found])
        for pattern, found in patterns.items()
    }
    assert effusion["covid"] == 0
    assert 0.25 < effusion["pneumonia"] < 0.55
    for figure in (one_sided, depth, density):  # no single figure of the patient gives the class away
        area = (figure["pneumonia"][:, None] > figure["covid"][None, :]).mean()
        assert 0.6 < area < 0.97


def test_another_pneumonias_lesions_lie_in_the_lungs_and_its_effusion_on_its_own_side():
    anatomy = next(
        found
        for found in (patient(seed, positive=True, pattern="pneumonia") for seed in range(60))
        if found.confounders.dependent_opacity == 0.97 and len({lesion.side for lesion in found.lesions}) == 1
    )
    hu, lung, lesion, geometry = acquire(anatomy, SCANNER["B3"], matrix=128, slice_thickness_mm=10.0, seed=1)
    assert lesion.sum() * np.prod(geometry.spacing_mm) > 5_000  # mm^3
    assert not (lesion & ~lung).any()
    right = np.broadcast_to(geometry.origin_mm[0] + np.arange(128) * geometry.spacing_mm[2] < 0, hu.shape)
    sick = right if anatomy.lesions[0].side < 0 else ~right
    assert (lesion & sick).sum() > 0.95 * lesion.sum()
    fluid = lung & ~lesion & (hu > -100)
    fluid[: len(fluid) // 6] = False  # where the diaphragm's partial volume looks the same
    assert (fluid & sick).sum() > 3 * (fluid & ~sick).sum()


def test_the_aorta_ends_in_a_round_arch(positive):
    s, ap = positive.size, positive.depth
    thorax = Thorax(positive, matrix=128, field_of_view_mm=360)
    x, y = thorax.grid.fine
    left = np.hypot(x - 36 * s, y - 50 * ap * s) < 8  # beside the spine, where lung follows above the arch
    free = [thorax.slab(z, 2.0)[1][left].mean() for z in np.arange(50.0, 90.0, 2.0)]
    assert free[0] < 0.3
    assert free[-1] > 0.95
    assert np.max(np.diff(free)) < 0.5, "the lung closes over the arch step by step, not at once"
    hu, lung, _ = thorax.slab(68.0, 2.0)
    arch = np.hypot(x - 12 * s, y - 25 * ap * s) < 4
    assert not lung[arch].any()
    assert hu[arch].mean() == pytest.approx(43, abs=12)


def test_a_coarser_matrix_shows_the_same_patient(positive):
    fine, coarse = (Thorax(positive, matrix=matrix, field_of_view_mm=360).slab(0.0, 5.0)[0] for matrix in (256, 128))
    pooled = fine.reshape(128, 2, 128, 2).mean((1, 3))
    assert np.corrcoef(pooled.ravel(), coarse.ravel())[0, 1] > 0.99


def test_vessels_taper_stay_in_the_lungs_and_draw_as_capsules(positive):
    segments = grow_vessels(positive)
    assert len(segments) > 3000
    assert segments[:, 6].min() >= SMALLEST_MM
    assert segments[:, 6].max() < 4.4
    ends = segments[segments[:, 6] < 1.5, 3:6]
    side = np.where(ends[:, 0] < 0, -1, 1)
    width = positive.lung_width(ends[:, 2])
    wall = np.where(
        side < 0,
        positive.lung_wall(-1, ends[:, 0], ends[:, 1], width),
        positive.lung_wall(1, ends[:, 0], ends[:, 1], width),
    )
    assert np.mean(wall < 0) > 0.97

    grid = Grid(128, 128.0, 3.0, -2.0, 4.0)
    rng = np.random.default_rng(0)
    start, end = rng.uniform(-40, 40, (6, 3)), rng.uniform(-40, 40, (6, 3))
    few = np.concatenate([start, end, np.full((6, 1), 3.0), np.full((6, 1), 2.0)], 1).astype(np.float32)
    drawn = draw_vessels(few, grid, 2.0, 1.0)
    x, y = (axis.astype(np.float64) for axis in grid.fine)
    points = np.stack([x, y, np.full_like(x, 2.0)], -1)
    expected = np.zeros_like(x)
    for p, q in zip(few[:, :3].astype(float), few[:, 3:6].astype(float), strict=True):
        u = np.clip((points - p) @ (q - p) / ((q - p) @ (q - p)), 0, 1)
        distance = np.linalg.norm(points - p - u[..., None] * (q - p), axis=-1)
        expected = np.maximum(expected, np.clip(0.5 - (distance - (3 - u)), 0, 1))
    np.testing.assert_allclose(drawn, expected, atol=2e-3)


def test_random_fields_have_unit_variance_and_their_correlation_length():
    axis = np.arange(-150, 150, 2.0, dtype=np.float32)
    scale, lag = 8.0, 4
    values = [SmoothField(np.random.default_rng(n), scale, axis).plane(0.0) for n in range(40)]
    assert np.mean([v.var() for v in values]) == pytest.approx(1, abs=0.1)
    correlation = np.mean([np.mean(v[:, lag:] * v[:, :-lag]) for v in values])
    assert correlation == pytest.approx(np.exp(-0.5 * (lag * 2 / scale) ** 2), abs=0.08)


def test_a_fields_slab_average_is_the_mean_of_its_planes():
    field = SmoothField(np.random.default_rng(1), 5.0, np.linspace(-50, 50, 60, dtype=np.float32))
    planes = [field.plane(z) for z in np.linspace(7 - 2.5, 7 + 2.5, 400)]
    np.testing.assert_allclose(field.plane(7.0, thickness=5.0), np.mean(planes, 0), atol=5e-3)


@settings(max_examples=50, deadline=None)
@given(
    x=st.floats(-100, 100),
    y=st.floats(-100, 100),
    a=st.floats(5, 90),
    b=st.floats(5, 90),
    power=st.floats(2, 4),
)
def test_a_superellipses_distance_has_the_sign_of_its_equation(x, y, a, b, power):
    level = (abs(x) / a) ** power + (abs(y) / b) ** power
    distance = float(superellipse(np.array(x, np.float32), np.array(y, np.float32), a, b, power))
    if abs(level - 1) > 0.05:
        assert (distance < 0) == (level < 1)


@settings(max_examples=50, deadline=None)
@given(a=st.floats(-50, 50), b=st.floats(-50, 50), width=st.floats(1, 40))
def test_a_smooth_minimum_is_never_above_the_minimum_nor_a_quarter_width_below(a, b, width):
    blended = float(smooth_minimum(np.array(a, np.float32), np.array(b, np.float32), width))
    assert min(a, b) - width / 4 - 1e-3 <= blended <= min(a, b) + 1e-3


def test_coverage_is_a_half_on_the_edge_and_saturates():
    np.testing.assert_allclose(coverage(np.array([-5.0, -0.35, 0, 0.35, 5]), 0.7), [1, 1, 0.5, 0, 0], atol=1e-6)
