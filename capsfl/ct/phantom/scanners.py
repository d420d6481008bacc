"""The six scanners of Table II and what they do to a chest: blur, noise, streaks, offset and padding."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from capsfl.ct.phantom.anatomy import Anatomy
from capsfl.ct.phantom.shapes import Float, Grid, multiply
from capsfl.ct.phantom.thorax import Thorax

_BEYOND_MM = 12.0
"""The scan starts this far below the lungs' base and ends as far above their apex."""

MAXIMUM_HU = 3071


@dataclass(frozen=True)
class Scanner:
    """A CT scanner with the reconstruction its hospital uses for the lung."""

    id: str
    hospital: str
    manufacturer: str
    model: str
    kernel: str
    window_level: float
    """HU"""
    window_width: float
    """HU"""
    field_of_view_mm: float
    fwhm_mm: float
    """Width of the in-plane point spread function."""
    edge: float
    """Strength of the kernel's edge enhancement."""
    noise_hu: float
    """Standard deviation scale of the noise."""
    noise_peak: float
    """Frequency constant of the noise power spectrum (cycles/mm)."""
    offset_hu: float
    padding_hu: int
    """Value outside the reconstruction circle."""
    kilovolts: int = 120
    signed: bool = False
    """Whether stored values are two's complement."""

    @property
    def minimum_hu(self) -> int:
        """Smallest HU inside the circle: one above the padding where both would meet, else -1024."""
        return -1023 if self.padding_hu == -1024 else -1024


_SIEMENS, _PHILIPS, _GE = "SIEMENS", "Philips", "GE MEDICAL SYSTEMS"
SCANNERS: tuple[Scanner, ...] = (
    Scanner("A1", "A", _SIEMENS, "SOMATOM Scope", "B31s", -600, 1200, 360, 1.1, 0.0, 22, 0.32, 3, -1024, 130),
    Scanner(
        "A2",
        "A",
        _SIEMENS,
        "SOMATOM Definition Edge",
        "I70f",
        -600,
        1200,
        340,
        0.75,
        0.55,
        48,
        0.62,
        -2,
        -1024,
    ),
    Scanner("B3", "B", _PHILIPS, "Brilliance 16P", "B", -600, 1600, 375, 1.2, 0.0, 28, 0.28, 6, -1000),
    Scanner("B4", "B", _PHILIPS, "Brilliance iCT", "YA", -600, 1600, 350, 0.9, 0.3, 34, 0.45, 1, -1000),
    Scanner("C5", "C", _PHILIPS, "Brilliance iCT", "YB", -600, 1600, 355, 0.85, 0.3, 30, 0.48, -4, -1000),
    Scanner("C6", "C", _GE, "16-slice CT", "LUNG", -500, 1500, 400, 1.0, 0.35, 42, 0.5, 8, -3024, signed=True),
)
"""Table II's devices and windows; the physics are plausible values that tell the devices apart."""


@dataclass(frozen=True)
class Geometry:
    """Where a series' voxels lie: axes (z, y, x) point to the patient's superior, posterior and left."""

    spacing_mm: tuple[float, float, float]
    """z, y, x"""
    origin_mm: tuple[float, float, float]
    """x, y, z of the first voxel's centre"""

    @property
    def affine(self) -> NDArray[np.float64]:
        """Matrix `(4, 4)` from array indices (k, j, i, 1) to LPS (x, y, z, 1) in mm."""
        affine = np.zeros((4, 4))
        affine[2, 0], affine[1, 1], affine[0, 2] = self.spacing_mm
        affine[:3, 3], affine[3, 3] = self.origin_mm, 1
        return affine


class Detector:
    """A scanner's transfer functions on one matrix.

    The blur is a Gaussian modulation transfer function with edge enhancement at mid frequencies; the noise
    has the ramp-shaped spectrum of filtered backprojection, f exp(-(f/f0)^2) (Riederer, Pelc and Chesler
    1978).
    """

    def __init__(self, scanner: Scanner, grid: Grid) -> None:
        self.scanner, self._grid = scanner, grid
        n, pixel = grid.matrix, grid.pixel_mm
        rows, columns = fft.fftfreq(n, pixel)[:, None], fft.rfftfreq(n, pixel)[None, :]
        frequency = np.hypot(rows, columns)
        gauss = np.exp(-((np.pi * scanner.fwhm_mm * frequency) ** 2) / (4 * np.log(2)))
        boost = 1 + 2.2 * scanner.edge * (frequency / 0.5) ** 2 * np.exp(-((frequency / 0.6) ** 2))
        self._transfer = (gauss * boost).astype(np.float32)
        ramp = np.sqrt(frequency * np.exp(-((frequency / scanner.noise_peak) ** 2)) + 1e-4)
        self._noise = self._unit_variance(ramp)
        # Streaks run along the rows; their correlation is 1 x 28 pixels of a 512 matrix.
        unit = 512 / n
        streak = -2 * (np.pi * pixel) ** 2 * (rows**2 + (28 / unit * columns) ** 2)
        self._streak = self._unit_variance(np.exp(streak))
        distance = np.subtract.outer(grid.coarse_axis, grid.coarse_axis)
        blur = np.exp(-0.5 * (distance / 18.0) ** 2)
        self._attenuation = (blur / blur.sum(1, keepdims=True)).astype(np.float32)
        self.outside = np.hypot(grid.axis[:, None], grid.axis[None, :]) >= scanner.field_of_view_mm / 2

    def _unit_variance(self, transfer: NDArray) -> Float:
        """Scale a filter so that uniform white spectra give fields of variance 1."""
        n = self._grid.matrix
        twice = np.full(transfer.shape[1], 2.0)
        twice[[0, -1]] = 1.0
        power = 2 * (transfer**2 * twice).sum() / n**4
        return (transfer / np.sqrt(power)).astype(np.float32)

    def _field(self, rng: np.random.Generator, transfer: Float) -> Float:
        """A stationary Gaussian field with the filter's spectrum.

        Uniform spectral coefficients do: every pixel sums some 10^4 to 10^5 of them (central limit theorem).
        """
        n = self._grid.matrix
        noise = rng.random((n, 2 * transfer.shape[1]), dtype=np.float32)
        noise -= np.float32(0.5)
        noise *= np.float32(np.sqrt(12))
        spectrum = noise.view(np.complex64) * transfer
        return np.asarray(fft.irfft2(spectrum, s=(n, n), overwrite_x=True))

    def expose(self, hu: Float, rng: np.random.Generator, *, shoulder: float) -> NDArray[np.int16]:
        """Turn true densities into the image this scanner reconstructs.

        Args:
            hu: True densities `(matrix, matrix)`.
            rng: Source of the noise.
            shoulder: 0 to 1, strength of the photon-starvation streaks.
        """
        spectrum = np.asarray(fft.rfft2(hu))
        spectrum *= self._transfer
        image = np.asarray(fft.irfft2(spectrum, s=hu.shape, overwrite_x=True))
        noise = self._field(rng, self._noise)
        if shoulder > 0:
            noise += np.float32(0.8 * shoulder) * self._field(rng, self._streak)
        # More tissue around a ray, fewer photons, more noise.
        stride = self._grid.stride
        tissue = np.pad(image[::stride, ::stride] > -300, (0, 1), mode="edge").astype(np.float32)
        smooth = multiply(multiply(self._attenuation, tissue), self._attenuation.T)
        noise *= self._grid.refine(self.scanner.noise_hu * (np.float32(0.45) + np.float32(0.75) * smooth))
        image += noise
        image += np.float32(self.scanner.offset_hu)
        np.clip(np.rint(image, out=image), self.scanner.minimum_hu, MAXIMUM_HU, out=image)
        image[self.outside] = self.scanner.padding_hu
        return image.astype(np.int16)


def acquire(
    anatomy: Anatomy, scanner: Scanner, *, matrix: int = 512, slice_thickness_mm: float = 5.0, seed: int
) -> tuple[NDArray[np.int16], NDArray[np.bool_], NDArray[np.bool_], Geometry]:
    """Scan a patient from below the lungs to above them, in contiguous slices.

    Args:
        anatomy: The patient.
        scanner: The scanner.
        matrix: Rows and columns of a slice.
        slice_thickness_mm: Slice thickness and spacing.
        seed: Seed of the noise and of the first slice's height.

    Returns:
        Hounsfield units, lung mask and lesion mask, each `(slices, matrix, matrix)`, and their geometry.
    """
    thorax = Thorax(anatomy, matrix=matrix, field_of_view_mm=scanner.field_of_view_mm)
    detector = Detector(scanner, thorax.grid)
    rng = np.random.default_rng([seed, 5])
    first = round(anatomy.base_z - _BEYOND_MM + rng.uniform(-0.5, 0.5) * slice_thickness_mm, 1)
    count = int(np.ceil((anatomy.apex_z + _BEYOND_MM - first) / slice_thickness_mm))
    hu = np.empty((count, matrix, matrix), np.int16)
    lung, lesion = np.empty(hu.shape, bool), np.empty(hu.shape, bool)
    for k in range(count):
        z = first + k * slice_thickness_mm
        true, lung[k], lesion[k] = thorax.slab(z, slice_thickness_mm)
        shoulder = float(np.clip((anatomy.height(z) - 0.75) / 0.2, 0, 1))
        hu[k] = detector.expose(true, rng, shoulder=shoulder)
    lung &= ~detector.outside
    lesion &= ~detector.outside
    pixel, corner = thorax.grid.pixel_mm, float(thorax.grid.axis[0])
    return hu, lung, lesion, Geometry((slice_thickness_mm, pixel, pixel), (corner, corner, first))
