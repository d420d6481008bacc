"""Opacities of the lung: COVID lesions, which enter the mask, and atelectasis and oedema, which do not."""

from dataclasses import dataclass

import numpy as np

from capsfl.ct.phantom.anatomy import Anatomy
from capsfl.ct.phantom.disease import Lesion
from capsfl.ct.phantom.shapes import Float, Grid, SmoothField, smoothstep

MASK_OPACITY = 0.12
"""A voxel belongs to a lesion when the lesion replaces more than this fraction of its parenchyma."""

CONSOLIDATION = 0.75


@dataclass(frozen=True)
class OpacityFields:
    """The random fields that make opacities irregular."""

    border: SmoothField
    density: SmoothField
    paving: tuple[SmoothField, SmoothField]
    bronchi: tuple[SmoothField, SmoothField]
    septa: SmoothField


def lesion_center(anatomy: Anatomy, lesion: Lesion) -> tuple[float, float, float]:
    """Centre (x, y, z) of a lesion in the patient's frame (mm)."""
    z = anatomy.base_z + lesion.height * (anatomy.apex_z - anatomy.base_z)
    middle, a, b = anatomy.lung_axes(lesion.side, anatomy.lung_width(z))
    c, s = np.cos(lesion.angle), np.sin(lesion.angle)
    radius = 1 / np.hypot(c / a, s / b) - lesion.depth_mm
    return float(lesion.side * (middle + radius * c)), float(8 + radius * s), z


def draw_lesions(
    anatomy: Anatomy, fields: OpacityFields, grid: Grid, z: float, texture: Float, *, thickness: float
) -> tuple[Float, Float]:
    """Opacity of the lesions and weight of their crazy paving in the slab at `z`, each `(matrix, matrix)`."""
    opacity = np.zeros((grid.matrix, grid.matrix), np.float32)
    paving = np.zeros_like(opacity)
    near = [(lesion, lesion_center(anatomy, lesion)) for lesion in anatomy.lesions]
    near = [(lesion, center) for lesion, center in near if abs(center[2] - z) < 2.6 * lesion.radius_mm]
    if not near:
        return opacity, paving
    warp = 0.30 * fields.border.plane(z, thickness=thickness) + np.float32(0.10) * texture
    reach = 1.15 + float(warp.max())
    mottle = fields.density.plane(z, thickness=thickness)
    x, y = grid.fine
    for lesion, (cx, cy, cz) in near:
        radius = lesion.radius_mm
        if abs(z - cz) > reach * radius:
            continue
        box = grid.box(cx, cy, 1.25 * reach * radius, 1.25 * reach * radius)
        nx, ny = np.float32(lesion.side * np.cos(lesion.angle)), np.float32(np.sin(lesion.angle))
        u, v = x[box] - np.float32(cx), y[box] - np.float32(cy)
        across = (u * nx + v * ny) * np.float32(1 / (lesion.flattening * radius))
        along = (v * nx - u * ny) * np.float32(1 / (1.25 * radius))
        distance = np.sqrt(across * across + along * along + np.float32(((z - cz) / radius) ** 2))
        edge = 0.16 if lesion.opacity > 0.7 else 0.30
        body = smoothstep((1 - distance + warp[box]) * np.float32(1 / edge) + np.float32(0.5))
        density = np.float32(lesion.opacity) * body
        if lesion.opacity < 0.7:
            density *= 1 + np.float32(0.18) * mottle[box]
        np.maximum(opacity[box], np.clip(density, 0, 0.98), out=opacity[box])
        if lesion.crazy_paving:
            np.maximum(paving[box], body, out=paving[box])
    if paving.any():
        rows, columns = np.flatnonzero(paving.any(1)), np.flatnonzero(paving.any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        walls = (field.sheets(z, 0.16, box, thickness=thickness) for field in fields.paving)
        paving[box] *= np.maximum(*walls)
        paving *= 0.22 * (opacity > 0.1)
    return opacity, paving


def air_bronchograms(fields: OpacityFields, opacity: Float, z: float, *, thickness: float) -> Float | None:
    """Weight of air-filled tubes inside consolidations: lines where two fields cross zero together."""
    consolidated = opacity > CONSOLIDATION
    if not consolidated.any():
        return None
    wide, narrow = fields.bronchi
    lines = narrow.sheets(z, 0.05, thickness=thickness) * wide.sheets(z, 0.16, thickness=thickness)
    return 0.8 * lines * consolidated


def draw_confounders(
    anatomy: Anatomy, fields: OpacityFields, grid: Grid, z: float, wall: Float, *, thickness: float
) -> Float | None:
    """Opacity of atelectasis and oedema in the slab at `z`; None where there is none.

    Dependent atelectasis is a crescent along the posterior pleura of the lung bases; plates are thin oblique
    sheets; hydrostatic oedema is a perihilar, gravity-dependent haze with thickened septa (Fleischner Society
    glossary, Hansell et al. 2008).
    """
    mimics, (x, y) = anatomy.confounders, grid.fine
    t = float(anatomy.height(z))
    opacity: Float | None = None
    if mimics.dependent_mm and t < mimics.dependent_height:
        # Collapse thins out towards its upper end and follows gravity: the deepest part of each lung.
        fade = np.float32(np.sqrt(np.clip((mimics.dependent_height - t) / 0.3, 0, 1)))
        side = np.where(x > 0, np.float32(mimics.dependent_balance), np.float32(1))
        ragged = 1 + np.float32(0.22) * fields.border.plane(z, thickness=thickness)
        thick = np.float32(mimics.dependent_mm) * fade * side * ragged * np.clip((y - 15) / 55, 0, 1)
        crescent = smoothstep((thick + wall) * np.float32(1 / 5) + np.float32(0.5)) * (thick > 1)
        opacity = np.float32(mimics.dependent_opacity) * crescent
    for band in mimics.bands:
        cz = anatomy.base_z + band.height * (anatomy.apex_z - anatomy.base_z)
        if abs(z - cz) > 1.6 * band.half_length_mm + thickness:
            continue
        middle, _, _ = anatomy.lung_axes(band.side, anatomy.lung_width(cz))
        cx, cy = band.side * float(middle) + band.offset_mm[0], 8 + band.offset_mm[1]
        box = grid.box(cx, cy, band.half_length_mm + 4, band.half_length_mm + 4)
        u, v = x[box] - np.float32(cx), y[box] - np.float32(cy)
        bend = np.float32(2.0) * fields.border.plane(z, box, thickness=thickness)
        height = np.float32(z - cz) - np.float32(band.slope[0]) * u - np.float32(band.slope[1]) * v + bend
        # A Gaussian profile averaged over the slab widens and fades: variances add, the integral stays.
        width = float(np.hypot(band.thickness_mm / 2, thickness / np.sqrt(6)))
        sheet = np.exp(-((height * np.float32(1 / width)) ** 2)) * np.float32(band.thickness_mm / 2 / width)
        extent = smoothstep((np.float32(band.half_length_mm) - np.hypot(u, v)) * np.float32(1 / 6))
        if opacity is None:
            opacity = np.zeros((grid.matrix, grid.matrix), np.float32)
        np.maximum(opacity[box], np.float32(band.opacity) * sheet * extent, out=opacity[box])
    if mimics.oedema:
        radial = (np.abs(x) - np.float32(40 * anatomy.size)) ** 2 + (y - 8) ** 2
        perihilar = np.exp(-(radial + np.float32((z - 4) ** 2)) * np.float32(1 / 62**2))
        gravity = np.clip((y + 50) * np.float32(1 / 110), 0, 1)
        patchy = np.clip(1 + np.float32(0.45) * fields.density.plane(z, thickness=thickness), 0.2, None)
        haze = np.float32(mimics.oedema) * patchy * (0.75 * perihilar + 0.55 * gravity)
        basal = np.float32(mimics.septal * (0.35 + 0.65 * np.clip(1.2 - t, 0, 1)))
        outer = np.exp(wall * np.float32(1 / 22))
        haze += basal * fields.septa.sheets(z, 0.12, thickness=thickness) * (np.float32(0.35) + outer) * gravity
        opacity = haze if opacity is None else np.maximum(opacity, haze, out=opacity)
    return None if opacity is None else np.clip(opacity, 0, 0.98, out=opacity)
