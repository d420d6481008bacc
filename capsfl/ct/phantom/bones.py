"""Spine, ribs, sternum and scapulae: cortical shells around marrow."""

from functools import cached_property

import numpy as np

from capsfl.ct.phantom.anatomy import Anatomy
from capsfl.ct.phantom.chest import Slab
from capsfl.ct.phantom.shapes import Box, Float, Grid, coverage, overlap, paint, rotate, superellipse

_VERTEBRA_MM = 25.0
_RIB_PITCH_MM = 27.0
_RIB_SLOPE_MM = 44.0
"""Rise of a rib, in mm a radian from back to front."""


class Skeleton:
    """Bones of one patient on one grid."""

    def __init__(self, anatomy: Anatomy, grid: Grid) -> None:
        self._anatomy, self._grid = anatomy, grid

    @cached_property
    def _rib_angle(self) -> Float:
        """Direction around the chest: -pi/2 at the spine, +pi/2 at the sternum."""
        x, y = self._grid.fine
        return np.arctan2(20 - y, np.abs(x))

    @cached_property
    def _rib_rise(self) -> Float:
        return (self._rib_angle + np.float32(np.pi / 2)) * np.float32(_RIB_SLOPE_MM)

    @cached_property
    def _rib_end(self) -> Float:
        """Distance past the bony rib's two ends: at the vertebra and at the costal cartilage."""
        x, _ = self._grid.fine
        front = np.clip((self._rib_angle - np.float32(1.05)) * 60, 0, None)
        return np.maximum(np.float32(24 * self._anatomy.size) - np.abs(x), front)

    @cached_property
    def _cartilage_end(self) -> Float:
        x, _ = self._grid.fine
        middle = np.float32(22 * self._anatomy.size) - np.abs(x)
        return np.where(self._rib_angle > 1.08, middle, np.float32(99))

    def paint(self, hu: Float, slab: Slab, texture: Float) -> None:
        """Paint every bone of the slab over `hu`."""
        marrow = 35 * texture
        self._paint_vertebra(hu, slab, marrow)
        self._paint_ribs(hu, slab, marrow)
        self._paint_sternum(hu, slab, marrow)
        self._paint_scapulae(hu, slab, marrow)

    def _paint_vertebra(self, hu: Float, slab: Slab, marrow: Float) -> None:
        s, ap = self._anatomy.size, self._anatomy.depth
        heights = np.linspace(slab.z - slab.thickness / 2, slab.z + slab.thickness / 2, 9) / _VERTEBRA_MM % 1
        disc = float(np.mean(np.abs(heights - 0.5) < 0.1))
        process = float(np.mean(heights < 0.55))
        x, y = self._grid.fine
        box = self._grid.box(0, 70 * ap * s, 20 * s, 17 * s)
        body = superellipse(x[box], y[box] - 70 * ap * s, 17 * s, 13.5 * s, 2.5)
        paint(hu[box], coverage(body), 480 - 395 * disc)
        paint(hu[box], coverage(body + 1.6, 1.2), 175 - 90 * disc + marrow[box])

        box = self._grid.box(0, 104 * ap * s, 37, 28)
        u, v = x[box], y[box]
        canal = np.hypot(u, v - 91 * ap * s)
        spinous = np.where(v > 92 * ap * s, np.abs(u) - np.float32(3.4), np.float32(99))
        arch = np.minimum(np.abs(canal - 12.5) - 2.6, spinous + np.clip(v - 124 * ap * s, 0, 99))
        transverse = np.maximum(np.abs(v - (88 * ap * s + 0.25 * np.abs(u))) - 4.5, np.abs(u) - 34)
        for lamina, share in ((np.minimum(arch, transverse), process), (arch, 1 - process)):
            if share:
                bone = np.where(v < 85 * ap * s - 6, np.float32(99), lamina)
                bone = np.maximum(bone, 9 - canal)
                self._paint_bone(hu, box, bone, marrow, cortex=1.6, share=share)
        paint(hu[box], coverage(canal - 9), -40)
        paint(hu[box], coverage(canal - 6), 30)

    def _paint_bone(
        self, hu: Float, box: Box, distance: Float, marrow: Float, *, cortex: float = 2.0,
        cortical_hu: float = 620, marrow_hu: float = 170, share: float = 1.0,
    ) -> None:  # fmt: skip
        paint(hu[box], coverage(distance) * np.float32(share), cortical_hu)
        paint(hu[box], coverage(distance + np.float32(cortex), 1.2) * np.float32(share), marrow_hu + marrow[box])

    def _paint_ribs(self, hu: Float, slab: Slab, marrow: Float) -> None:
        present = overlap(slab.z, slab.thickness, -1e3, self._upper(1.02))
        if not present:
            return
        phase = (self._rib_rise + np.float32(slab.z)) * np.float32(1 / _RIB_PITCH_MM)
        phase += np.float32(0.5)
        phase -= np.floor(phase)
        height = np.abs(phase - np.float32(0.5)) * np.float32(_RIB_PITCH_MM)
        shell = np.abs(slab.cavity - 8)
        bone = np.maximum(shell - np.float32(3.6), self._rib_end)
        edge = float(np.hypot(1.2, slab.thickness))
        share = np.float32(present)
        paint(hu, coverage(bone) * coverage(height - 6, slab.dome_edge) * share, 700)
        paint(hu, coverage(bone + np.float32(1.5), 1.2) * coverage(height - 4.5, edge) * share, 210 + marrow)
        present = overlap(slab.z, slab.thickness, -1e3, self._upper(0.75))
        if present:
            cartilage = coverage(np.maximum(shell - 4, self._cartilage_end))
            cartilage *= coverage(height - np.float32(6.5), slab.dome_edge)
            paint(hu, cartilage * np.float32(present), 95)

    def _upper(self, t: float) -> float:
        return self._anatomy.base_z + t * (self._anatomy.apex_z - self._anatomy.base_z)

    def _paint_sternum(self, hu: Float, slab: Slab, marrow: Float) -> None:
        s, ap = self._anatomy.size, self._anatomy.depth
        share = overlap(slab.z, slab.thickness, self._upper(0.15), self._upper(0.95))
        if share:
            center = -80 * ap * s * (0.55 + 0.45 * slab.width) - 9
            box = self._grid.box(0, center, 30 * s, 8)
            x, y = (v[box] for v in self._grid.fine)
            bone = superellipse(x, y - np.float32(center), (28 if slab.t > 0.72 else 20) * s, 6.5, 3.0)
            self._paint_bone(hu, box, bone, marrow, cortex=1.8, cortical_hu=480, marrow_hu=120, share=share)

    def _paint_scapulae(self, hu: Float, slab: Slab, marrow: Float) -> None:
        if slab.t <= 0.42:
            return
        s, ap = self._anatomy.size, self._anatomy.depth
        center = (96 + 20 * slab.shoulder) * s
        for side in (-1, 1):
            box = self._grid.box(side * center, 74 * ap * s, 40, 40)
            x, y = (v[box] for v in self._grid.fine)
            u, v = rotate(np.abs(x) - np.float32(center), y - np.float32(74 * ap * s), -48.0)
            blade = np.abs(v - np.float32(0.004) * u * u) - (2.6 + 2 * np.exp(-(((u - 24) / 9) ** 2)))
            blade = np.maximum(blade, np.abs(u) - np.float32(34 * np.clip((slab.t - 0.42) / 0.15, 0, 1)))
            blade = np.maximum(blade, 15 - slab.cavity[box])
            self._paint_bone(hu, box, blade, marrow, cortex=1.2, marrow_hu=250)
