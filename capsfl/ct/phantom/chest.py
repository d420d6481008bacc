"""Chest wall, mediastinum and upper abdomen, painted back to front."""

from dataclasses import dataclass

import numpy as np

from capsfl.ct.phantom.anatomy import Anatomy
from capsfl.ct.phantom.shapes import (
    EDGE_MM,
    Float,
    Grid,
    SmoothField,
    coverage,
    overlap,
    paint,
    smooth_minimum,
    superellipse,
)


@dataclass(frozen=True)
class Slab:
    """One slice's geometry: signed distances (mm), each `(matrix, matrix)` unless a number."""

    z: float
    thickness: float
    t: float
    """Fraction of the lungs' height."""
    width: float
    """Relative width of the lungs' cross-section."""
    shoulder: float
    """0 below the shoulders to 1 across them."""
    wall_edge: float
    """Soft edge of the lungs' chest wall: where they taper, the slab's top and bottom differ in width."""
    dome_edge: float
    """Soft edge of horizontal surfaces: the slab's thickness."""
    cavity: Float
    core: Float
    body: Float
    wall: Float
    dome: Float
    heart: Float
    heart_share: float
    """Fraction of the slab that holds any heart."""
    mediastinum: Float


def slab_geometry(anatomy: Anatomy, grid: Grid, wide: Float, z: float, thickness: float) -> Slab:
    """Evaluate the smooth surfaces of a slab.

    Args:
        anatomy: The patient.
        grid: The slice's pixels.
        wide: Subcutaneous-fat variation on the grid's nodes.
        z: Height of the slab's centre (mm).
        thickness: Slab thickness (mm).
    """
    s, ap = anatomy.size, anatomy.depth
    x, y = grid.coarse
    t, width = float(anatomy.height(z)), anatomy.lung_width(z)
    shoulder = float(np.clip((t - 0.78) / 0.35, 0, 1))
    below, above = anatomy.lung_width(np.array([z - thickness / 2, z + thickness / 2]))
    right, left = anatomy.lung_wall(-1, x, y, width), anatomy.lung_wall(1, x, y, width)
    cavity = smooth_minimum(left, right, 34.0)

    # Muscle: paraspinal, pectoral, lateral (serratus, latissimus) and shoulder-girdle bulges on a base layer.
    side = np.abs(x)
    pectoral = 13 * np.exp(-(((y + 60) / 30) ** 2) - ((side - 62) / 42) ** 2) * float(np.clip((t - 0.25) / 0.2, 0, 1))
    paraspinal = 12 * np.exp(-(((y - 66) / 26) ** 2) - ((side - 40) / 34) ** 2)
    muscle = 14 + 22 * shoulder + paraspinal + pectoral + 9 * np.exp(-(((side - 120) / 30) ** 2))
    trunk = superellipse(x, y - 12, (112 + 62 * shoulder) * s, (98 - 4 * shoulder) * ap * s, 2.1)
    core = smooth_minimum(cavity - muscle, trunk, 22.0)
    fat = anatomy.fat_mm * (1 + 0.18 * wide) + 6 * np.exp(-(((side - 95) / 40) ** 2))
    outline = superellipse(x, y - 6, (140 + 52 * shoulder) * s, (108 - 4 * shoulder) * ap * s, 2.15)
    body = smooth_minimum(core - fat, outline - anatomy.fat_mm * 0.3, 20.0)

    def heart_scale(height: float) -> float:
        level = (height - (anatomy.base_z + 46)) / (58 * anatomy.heart * s)
        return float(np.sqrt(max(1 - level * level, 0.0)))

    levels = [heart_scale(height) for height in np.linspace(z - thickness / 2, z + thickness / 2, 5)]
    share, scale = float(np.mean(np.array(levels) > 0)), float(np.mean(levels))
    heart = np.full_like(x, 99.0)
    if share:
        turned = np.deg2rad(-34.0)
        u, v = x - np.float32(21 * s), y + np.float32(30 * ap)
        c, sn = np.float32(np.cos(turned)), np.float32(np.sin(turned))
        size = anatomy.heart * s * scale
        heart = superellipse(c * u + sn * v, c * v - sn * u, 63 * size + 0.1, 46 * size + 0.1, 2.2)

    middle = superellipse(x - 2, y + 22, 26 * s, 62 * ap * s, 2.2)
    middle = smooth_minimum(middle, heart - 3, 14.0)
    middle = smooth_minimum(middle, superellipse(x, y - 66 * ap * s, 25 * s, 30 * s, 2.2), 12.0)
    # Descending aorta, with a round top, and arch: what the lungs must leave free.
    past_top = max(z - 66.0, 0.0)
    if past_top < 16:
        aorta = np.hypot(np.hypot(x - 27 * s, y - 50 * ap * s), np.float32(past_top)) - 12.5 * s - 2
        middle = smooth_minimum(middle, aorta, 6.0)
    arch_share, radius = _round_section(z - _ARCH_Z, thickness, _ARCH_MM * s)
    if arch_share:
        middle = smooth_minimum(middle, _along_arch(x, y, anatomy) - radius - 2, 6.0)
    hilum = np.hypot(side - 32 * s, y - 6) - (17 * np.exp(-(((z - 4) / 26) ** 2)) - 6)
    middle = smooth_minimum(middle, hilum, 8.0)

    def dome(center: float, top: float) -> Float:
        return z - (anatomy.base_z + top - ((x - center) / (70 * s)) ** 2 * 34 - ((y - 2) / (92 * ap * s)) ** 2 * 58)

    diaphragm = np.where(x < 0, dome(-66 * s, anatomy.dome_mm + 10), dome(70 * s, anatomy.dome_mm - 4))
    wall = np.maximum(np.minimum(right, left), 3 - side)
    surfaces = (cavity, core, body, wall, diaphragm, heart, middle)
    cavity, core, body, wall, diaphragm, heart, middle = (grid.refine(v.astype(np.float32)) for v in surfaces)
    return Slab(
        z=z, thickness=thickness, t=t, width=float(width), shoulder=shoulder,
        wall_edge=EDGE_MM + 91 * float(abs(above - below)), dome_edge=float(np.hypot(EDGE_MM, thickness)),
        cavity=cavity, core=core, body=body, wall=wall, dome=diaphragm, heart=heart, heart_share=share,
        mediastinum=middle,
    )  # fmt: skip


_ARCH_Z = 68.0
_ARCH_MM = 14.0


def _round_section(z: float, thickness: float, radius: float) -> tuple[float, float]:
    """Fraction of a slab that a sphere or a lying cylinder fills, and its mean half-width there (mm).

    Args:
        z: Height of the slab's centre above the body's (mm).
        thickness: Slab thickness (mm).
        radius: Of the body (mm).
    """
    heights = z + np.linspace(-0.5, 0.5, 9) * thickness
    widths = np.sqrt(np.clip(radius**2 - heights**2, 0, None))
    inside = widths > 0
    return float(np.mean(inside)), float(widths[inside].mean()) if inside.any() else 0.0


def _along_arch(x: Float, y: Float, anatomy: Anatomy) -> Float:
    """Distance (mm) to the aortic arch's axis, seen from above: from the sternum to the spine's left."""
    s, ap = anatomy.size, anatomy.depth
    along = np.clip((y + 22 * ap * s) / (72 * ap * s), 0, 1)
    return np.hypot(x - (41 * along - 15) * s, y - np.clip(y, -22 * ap * s, 50 * ap * s))


def paint_couch(anatomy: Anatomy, grid: Grid) -> Float:
    """Air and the couch, the same in every slice."""
    hu = np.full((grid.matrix, grid.matrix), -1000, np.float32)
    x, y = grid.axis[None, :], grid.axis[:, None]
    top = 132 * anatomy.depth * anatomy.size + 1.1 * anatomy.fat_mm + anatomy.center_y - x * x / 900
    bottom = top + 26 * np.clip(1 - (x / 205) ** 2, 0.12, 1)
    inside_width = np.abs(x) - 205
    above, beneath = np.float32(1) * (top - y), np.float32(1) * (y - bottom)
    foam = np.maximum(np.maximum(above, beneath), inside_width).astype(np.float32)
    shell = np.maximum(np.minimum(np.abs(above), np.abs(beneath)) - 1.1, inside_width).astype(np.float32)
    paint(hu, coverage(foam), -935)
    paint(hu, coverage(shell), -120)
    return hu


@dataclass(frozen=True)
class TissueFields:
    """The random fields of soft tissue; `wide` is on the grid's nodes, the others on its pixels."""

    muscle: SmoothField
    planes: SmoothField
    fat: SmoothField
    mediastinal_fat: SmoothField
    wide: SmoothField


def paint_wall(hu: Float, slab: Slab, fields: TissueFields, texture: Float) -> None:
    """Fat, skin and muscle with the fat planes between muscles."""
    z, thickness = slab.z, slab.thickness
    paint(hu, coverage(slab.body), 7 * fields.fat.plane(z, thickness=thickness) - 98)
    paint(hu, coverage(np.abs(slab.body + 1) - 1), 20)
    planes = fields.planes.sheets(z, 0.10, thickness=thickness)
    planes *= np.clip((slab.cavity - 9) * np.float32(1 / 8), 0, 1)
    paint(hu, coverage(np.maximum(slab.core, slab.body + 4), 1.5), 52 - np.float32(92) * planes + 6 * texture)
    paint(hu, coverage(slab.cavity - 4, 2.0), 38)


def paint_contents(hu: Float, anatomy: Anatomy, grid: Grid, slab: Slab, fields: TissueFields, wide: Float) -> None:
    """Mediastinal fat, abdominal organs under the diaphragm, heart, great vessels and oesophagus."""
    s, ap, z, thickness = anatomy.size, anatomy.depth, slab.z, slab.thickness
    x, y = grid.fine
    fat = np.clip(0.5 + 1.2 * fields.mediastinal_fat.plane(z, thickness=thickness), 0, 1)
    inside = coverage(slab.cavity)
    paint(hu, inside, np.float32(61.5) * fat - 88)

    below = coverage(slab.wall, slab.wall_edge) * coverage(slab.dome, slab.dome_edge) * inside
    if below.any():
        organs = np.where(grid.refine(wide) > 0, np.float32(-10), np.float32(-70))
        box = grid.box(78 * s, 46, 48, 48)
        paint(organs[box], coverage(np.hypot(x[box] - 78 * s, y[box] - 46) - 46), 48)
        paint(organs, coverage(x - np.float32(18 * s)), 58)
        paint(hu, below, organs)
        # The fundus' bubble of gas: an ellipsoid under the left dome.
        share, half = _round_section(z - anatomy.base_z - 4, thickness, 20.0)
        if share:
            box = grid.box(84 * s, -28, 32, 24)
            gas = superellipse(x[box] - 84 * s, y[box] + 28, 1.3 * half, 0.95 * half)
            paint(hu[box], coverage(gas - 2) * below[box] * np.float32(share), 40)
            paint(hu[box], coverage(gas) * below[box] * np.float32(share), -930)

    if slab.heart_share:
        paint(hu, coverage(slab.heart - 2.2) * slab.heart_share, -70)
        paint(hu, coverage(slab.heart) * slab.heart_share, 46)

    def tube(cx: float, cy: float, radius: float, low: float, high: float, value: float) -> None:
        share = overlap(z, thickness, low, high)
        if share:
            box = grid.box(cx * s, cy * ap * s, radius * s + 1, radius * s + 1)
            distance = np.hypot(x[box] - np.float32(cx * s), y[box] - np.float32(cy * ap * s))
            paint(hu[box], coverage(distance - np.float32(radius * s)) * share, value)

    tube(-17, -22, 16, 8, 74, 43)  # ascending aorta
    tube(-29, -14, 9.5, 0, 110, 43)  # superior vena cava
    tube(24, 50, 12.5, -150, 66, 43)  # descending aorta
    tube(14, -28, 14.5, 10, 38, 43)  # pulmonary trunk
    share, radius = _round_section(z - _ARCH_Z, thickness, _ARCH_MM * s)
    if share:
        box = grid.box(5 * s, 14 * ap * s, 40 * s, 55 * ap * s)
        paint(hu[box], coverage(_along_arch(x[box], y[box], anatomy) - np.float32(radius)) * np.float32(share), 43)
    for cx, cy, radius in ((-16, -16, 6.5), (4, -12, 4.5), (17, -2, 5), (-30, -20, 8), (24, -26, 7)):
        tube(cx, cy, radius, 80, 1000, 44)  # supra-aortic arteries and brachiocephalic veins
    share = overlap(z, thickness, 2, 30)
    if share:  # right and left pulmonary arteries
        box = grid.box(0, -8, 56 * s, 28)
        u, v = x[box], y[box]
        for side, start, rise in ((-1, -14, 16), (1, -24, 28)):
            along = np.clip(np.abs(u) / (36 * s), 0, 1)
            other = side * u
            artery = np.hypot(np.where(other > 0, 0, u), v - (start + rise * along)) - 10.5 * (1 - 0.25 * along)
            artery += 12 * np.clip(-other, 0, 1) + 12 * np.clip((np.abs(u) - 38 * s) / 4, 0, 9)
            paint(hu[box], coverage(artery.astype(np.float32)) * share, 44)
    box = grid.box(7 * s, 37 * ap * s, 8, 8)
    paint(hu[box], coverage(np.hypot(x[box] - 7 * s, y[box] - 37 * ap * s) - 7), 34)  # oesophagus


def airways(anatomy: Anatomy, z: float) -> tuple[tuple[float, float, float], ...]:
    """Centres and radii (mm) of the trachea, or below the carina of the main bronchi."""
    s, ap = anatomy.size, anatomy.depth
    if z > 22:
        return ((1.0 * s, 18.0 * ap * s, 8.6),)
    if z > -6:
        q = (22 - z) / 28
        return (
            (-(4 + 24 * q) * s, (18 - 4 * q) * ap * s, 6.8),
            ((4 + 30 * q) * s, (19 - 3 * q) * ap * s, 6.0),
        )
    return ()


def paint_airways(hu: Float, anatomy: Anatomy, grid: Grid, z: float, *, wall: bool) -> None:
    """The airways' walls, or their air."""
    x, y = grid.fine
    for cx, cy, radius in airways(anatomy, z):
        outer = radius + 1.6 if wall else radius
        box = grid.box(cx, cy, outer + 1, outer + 1)
        distance = np.hypot(x[box] - np.float32(cx), (y[box] - np.float32(cy)) * np.float32(1 / 0.92))
        paint(hu[box], coverage(distance - np.float32(outer)), 30 if wall else -985)
