"""One synthetic patient: body habitus, lung disease and its mimics, all drawn from a seed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capsfl.ct.phantom.shapes import Float, rotate, superellipse


@dataclass(frozen=True)
class Lesion:
    """A ground-glass or consolidated opacity of COVID pneumonia, placed by its lung's cross-section."""

    side: int
    """-1 right lung, +1 left lung."""
    angle: float
    """Direction from the lung's centre (radians): 0 lateral, pi/2 posterior."""
    height: float
    """Fraction of the lung's height, 0 at the base."""
    depth_mm: float
    """Distance of the centre below the pleura."""
    radius_mm: float
    flattening: float
    """Extent across the pleura over extent along the craniocaudal axis."""
    opacity: float
    """Fraction of the way from parenchyma to soft tissue: ground glass under .6, consolidation above .7."""
    crazy_paving: bool


@dataclass(frozen=True)
class Band:
    """Plate atelectasis: a thin dense oblique sheet, mostly basal."""

    side: int
    height: float
    offset_mm: tuple[float, float]
    slope: tuple[float, float]
    thickness_mm: float
    half_length_mm: float
    opacity: float


@dataclass(frozen=True)
class Confounders:
    """Opacities that are not the disease and never enter the lesion mask."""

    dependent_mm: float
    """Thickness of dependent (posterior, basal) atelectasis; 0 for none."""
    dependent_opacity: float
    dependent_height: float
    """Fraction of the lung's height that the dependent atelectasis reaches."""
    dependent_balance: float
    """Thickness on the left over thickness on the right."""
    bands: tuple[Band, ...]
    oedema: float
    """Opacity of perihilar, gravity-dependent haze; 0 for none."""
    septal: float
    """Opacity of thickened interlobular septa (Kerley lines)."""


@dataclass(frozen=True)
class Anatomy:
    """Everything about one patient that does not depend on the scanner; lengths in mm, densities in HU."""

    seed: int
    positive: bool
    size: float
    depth: float
    """Antero-posterior stretch."""
    fat_mm: float
    base_z: float
    apex_z: float
    heart: float
    lung_hu: float
    gravity_hu: float
    """HU difference between dependent and non-dependent lung."""
    dome_mm: float
    tilt_degrees: float
    center_x: float
    center_y: float
    lesions: tuple[Lesion, ...]
    confounders: Confounders

    def height(self, z: float | Float) -> float | Float:
        """Fraction of the lungs' height at `z`: 0 at the base, 1 at the apex."""
        return (z - self.base_z) / (self.apex_z - self.base_z)

    def lung_width(self, z: float | NDArray[np.floating]) -> NDArray[np.float64]:
        """Relative width of the lungs' cross-section at height `z`."""
        t = np.clip(self.height(np.asarray(z, np.float64)), 0, 1)
        taper = np.sqrt(np.clip(1 - np.clip((t - 0.35) / 0.65, 0, 1) ** 2.6, 0, 1))
        return np.maximum(taper * (0.93 + 0.07 * np.clip(t / 0.3, 0, 1)), 0.02)

    def lung_axes(self, side: int, width: NDArray[np.floating]) -> tuple[NDArray, NDArray, NDArray]:
        """Distance of the lung's centre from the midline and its lateral and sagittal semi-axes (mm)."""
        center = (34 + 36 * width) * self.size
        return center, (68 if side < 0 else 64) * width * self.size, 91 * width * self.depth * self.size

    def lung_wall(self, side: int, x: Float, y: Float, width: NDArray[np.floating]) -> Float:
        """Signed distance (mm) to one lung's chest wall in the cross-section of relative `width`."""
        center, a, b = (np.asarray(v, np.float32) for v in self.lung_axes(side, width))
        middle = (8 * self.depth * width + 10 * (1 - width)).astype(np.float32)
        u, v = rotate(x - side * center, y - middle, side * 9.0)
        return superellipse(u, v, a, b, 2.35)


def patient(seed: int, *, positive: bool) -> Anatomy:
    """Draw a patient.

    Args:
        seed: Any non-negative integer; equal seeds give equal patients.
        positive: Whether the patient has COVID pneumonia. Negative patients carry only confounders.
    """
    rng = np.random.default_rng([seed, 0])
    return Anatomy(
        seed=seed,
        positive=positive,
        size=rng.uniform(0.92, 1.06),
        depth=rng.uniform(0.94, 1.06),
        fat_mm=rng.uniform(9, 22),
        base_z=-118 * rng.uniform(0.9, 1.05),
        apex_z=122 * rng.uniform(0.93, 1.05),
        heart=rng.uniform(0.93, 1.1),
        lung_hu=rng.uniform(-870, -825),
        gravity_hu=rng.uniform(30, 70),
        dome_mm=rng.uniform(30, 46),
        tilt_degrees=rng.uniform(-6, 6),
        center_x=rng.uniform(-8, 8),
        center_y=rng.uniform(-6, 10),
        lesions=_draw_lesions(np.random.default_rng([seed, 1])) if positive else (),
        confounders=_draw_confounders(np.random.default_rng([seed, 2]), mild=positive),
    )


def _draw_lesions(rng: np.random.Generator) -> tuple[Lesion, ...]:
    """10 to 23 opacities: bilateral, posterior, basal, subpleural, as in COVID pneumonia."""
    count = int(rng.integers(10, 24))
    severity = rng.uniform(0.65, 1.35)
    kinds = ((0.25, 0.5), (0.35, 0.55), (0.75, 0.97))
    lesions = []
    for _ in range(count):
        low, high = kinds[int(rng.choice(3, p=[0.5, 0.28, 0.22]))]
        lesions.append(
            Lesion(
                side=int(rng.choice([-1, 1])),
                angle=np.deg2rad(rng.normal(55, 45)),
                height=float(np.clip(rng.beta(2, 2.8), 0.08, 0.85)),
                depth_mm=abs(rng.normal(0, 14)) + 4,
                radius_mm=rng.uniform(9, 26) * severity,
                flattening=rng.uniform(0.45, 0.85),
                opacity=rng.uniform(low, high),
                crazy_paving=bool(rng.uniform() < 0.35),
            )
        )
    return tuple(lesions)


def _draw_confounders(rng: np.random.Generator, *, mild: bool) -> Confounders:
    """Atelectasis and oedema: frequent in negatives, in mild form and less often in positives."""
    dependent, banded, oedematous = rng.uniform(size=3) < ((0.45, 0.3, 0.25) if mild else (0.7, 0.55, 0.4))
    strength = 0.6 if mild else 1.0
    bands = tuple(
        Band(
            side=int(rng.choice([-1, 1])),
            height=rng.uniform(0.12, 0.5),
            offset_mm=(rng.uniform(-15, 15), rng.uniform(-10, 45)),
            slope=(rng.normal(0, 0.35), rng.normal(0, 0.35)),
            thickness_mm=rng.uniform(1.8, 4.5),
            half_length_mm=rng.uniform(18, 42) * (0.7 if mild else 1.0),
            opacity=rng.uniform(0.5, 0.95),
        )
        for _ in range(int(rng.integers(1, 3 if mild else 6)) if banded else 0)
    )
    return Confounders(
        dependent_mm=rng.uniform(5, 18) * strength if dependent else 0.0,
        dependent_opacity=rng.uniform(0.3, 0.9),
        dependent_height=rng.uniform(0.35, 0.75),
        dependent_balance=rng.uniform(0.6, 1.6),
        bands=bands,
        oedema=rng.uniform(0.06, 0.2) * strength if oedematous else 0.0,
        septal=rng.uniform(0.1, 0.35) * strength if oedematous else 0.0,
    )
