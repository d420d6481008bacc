"""One synthetic patient: body habitus, lung disease and its mimics, all drawn from a seed."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from capsfl.ct.phantom.disease import Confounders, Lesion, Pattern, draw_confounders, draw_covid, draw_pneumonia
from capsfl.ct.phantom.shapes import Float, rotate, superellipse


@dataclass(frozen=True)
class Anatomy:
    """Everything about one patient that does not depend on the scanner; lengths in mm, densities in HU."""

    seed: int
    positive: bool
    """Whether there is pneumonia, which the lesion mask then outlines."""
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


def patient(seed: int, *, positive: bool, pattern: Pattern = "covid") -> Anatomy:
    """Draw a patient.

    Args:
        seed: Any non-negative integer; equal seeds give equal patients, of one build whatever their disease.
        positive: Whether the patient has pneumonia. Negative patients carry only confounders.
        pattern: Which pneumonia.
    """
    rng = np.random.default_rng([seed, 0])
    anatomy = Anatomy(
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
        lesions=draw_covid(np.random.default_rng([seed, 1])) if positive else (),
        confounders=draw_confounders(np.random.default_rng([seed, 2]), mild=positive),
    )
    if positive and pattern == "pneumonia":
        lesions, confounders = draw_pneumonia(np.random.default_rng([seed, 6]), anatomy.confounders)
        return replace(anatomy, lesions=lesions, confounders=confounders)
    return anatomy
