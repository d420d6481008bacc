"""A whole chest: slabs of Hounsfield units with lung and lesion masks, before a scanner blurs them."""

import numpy as np
from numpy.typing import NDArray

from capsfl.ct.phantom.anatomy import Anatomy
from capsfl.ct.phantom.bones import Skeleton
from capsfl.ct.phantom.chest import (
    Slab,
    TissueFields,
    paint_airways,
    paint_contents,
    paint_couch,
    paint_wall,
    slab_geometry,
)
from capsfl.ct.phantom.lesions import (
    CONSOLIDATION,
    MASK_OPACITY,
    OpacityFields,
    air_bronchograms,
    draw_confounders,
    draw_lesions,
)
from capsfl.ct.phantom.shapes import Float, Grid, SmoothField, coverage, paint
from capsfl.ct.phantom.vessels import draw_vessels, grow_vessels


class Thorax:
    """A patient on a pixel grid, ready to be cut into slabs."""

    def __init__(self, anatomy: Anatomy, *, matrix: int, field_of_view_mm: float) -> None:
        self.anatomy = anatomy
        self.grid = Grid(matrix, field_of_view_mm, anatomy.center_x, anatomy.center_y, anatomy.tilt_degrees)

        def field(number: int, scale_mm: float, *, nodes: bool = False) -> SmoothField:
            rng = np.random.default_rng([anatomy.seed, 3, number])
            return SmoothField(rng, scale_mm, self.grid.coarse_axis if nodes else self.grid.axis)

        self._texture = field(0, 5)
        self._density = field(1, 45, nodes=True)
        self._lobules = field(2, 3.2)
        density = field(4, 9)
        self._tissue = TissueFields(
            muscle=self._texture,
            planes=field(5, 7),
            fat=field(6, 14),
            mediastinal_fat=density,
            wide=field(7, 40, nodes=True),
        )
        self._opacities = OpacityFields(
            border=field(8, 9), density=density, paving=(field(9, 2.6), field(10, 2.8)),
            bronchi=(field(11, 9), field(12, 9)), septa=field(13, 8),
        )  # fmt: skip
        self._vessels = grow_vessels(anatomy)
        self._skeleton = Skeleton(anatomy, self.grid)
        self._background = paint_couch(anatomy, self.grid)

    def slab(self, z: float, thickness: float) -> tuple[Float, NDArray[np.bool_], NDArray[np.bool_]]:
        """Cut a slab of `thickness` mm centred on height `z`.

        Returns:
            Hounsfield units, lung mask and lesion mask, each `(matrix, matrix)`.
        """
        anatomy, grid = self.anatomy, self.grid
        wide = self._tissue.wide.plane(z, thickness=thickness)
        slab = slab_geometry(anatomy, grid, wide, z, thickness)
        texture = self._texture.plane(z, thickness=thickness)
        hu = self._background.copy()
        paint_wall(hu, slab, self._tissue, texture)
        paint_contents(hu, anatomy, grid, slab, self._tissue, wide)
        paint_airways(hu, anatomy, grid, z, wall=True)
        lung, lesion = self._paint_lungs(hu, slab, texture)
        paint_airways(hu, anatomy, grid, z, wall=False)
        self._skeleton.paint(hu, slab, texture)
        return hu, lung, lesion

    def _paint_lungs(self, hu: Float, slab: Slab, texture: Float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        anatomy, grid, z, thickness = self.anatomy, self.grid, slab.z, slab.thickness
        apex = np.clip((anatomy.apex_z - z) / thickness + 0.5, 0, 1)
        rough = np.float32(0.32) * texture
        lung = coverage(slab.wall + rough, slab.wall_edge) * coverage(rough - slab.mediastinum)
        lung *= coverage(-slab.dome, slab.dome_edge) * np.float32(apex)
        rows, columns = np.flatnonzero(lung.any(1)), np.flatnonzero(lung.any(0))
        if not rows.size:
            return np.zeros(lung.shape, bool), np.zeros(lung.shape, bool)
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        x, y = (v[box] for v in grid.fine)

        air = np.float32(14) * texture[box]
        air += np.float32(16) * grid.refine(self._density.plane(z, thickness=thickness))[box]
        air += np.float32(anatomy.gravity_hu) * np.clip((y + 10) * np.float32(1 / 80), -1.2, 1.2)
        air += np.float32(26) * self._lobules.sheets(z, 0.22, box, thickness=thickness)
        air += np.float32(anatomy.lung_hu)
        # Fissures: oblique sheets, widened and thinned by the slab (variances of Gaussians add).
        base = z - anatomy.base_z
        right = base - 66 - 1.05 * (y + 5) - 0.15 * x
        left = base - 72 - 1.1 * (y + 5) + 0.1 * x
        spread = float(np.hypot(1.1, thickness / np.sqrt(6)))
        air += np.float32(90 * 1.1 / spread) * np.exp(-((np.where(x < 0, right, left) * np.float32(1 / spread)) ** 2))

        inside = lung > 0.5
        opacity, paving = draw_lesions(anatomy, self._opacities, grid, z, texture, thickness=thickness)
        opacity *= inside
        mimics = draw_confounders(anatomy, self._opacities, grid, z, slab.wall, thickness=thickness)
        fill = np.clip(opacity + paving, 0, 0.98)
        if mimics is not None:
            fill = 1 - (1 - fill) * (1 - mimics)
        paint(air, fill[box], 40)
        vessels = draw_vessels(self._vessels, grid, z, thickness)
        vessels *= opacity <= CONSOLIDATION
        paint(air, vessels[box], 40)
        bronchi = air_bronchograms(self._opacities, opacity, z, thickness=thickness)
        if bronchi is not None:
            paint(air, bronchi[box], -900)
        paint(hu[box], lung[box], air)
        return inside, opacity > MASK_OPACITY
