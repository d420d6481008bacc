"""What a lung can have: COVID pneumonia, another pneumonia, and the mimics that are neither, drawn from a seed."""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

Pattern: TypeAlias = Literal["covid", "pneumonia"]
"""Which pneumonia a patient with pneumonia has: COVID, or another one, viral or bacterial."""


@dataclass(frozen=True)
class Lesion:
    """A ground-glass or consolidated opacity of a pneumonia, placed by its lung's cross-section."""

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


def draw_covid(rng: np.random.Generator) -> tuple[Lesion, ...]:
    """10 to 23 opacities: bilateral, posterior, basal, subpleural, as in COVID pneumonia.

    Of COVID pneumonias 80 % are peripheral, 91 % show ground glass, 4 % an effusion (Bai et al., Radiology 2020; 296:
    E46-E54).
    """
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


def draw_confounders(rng: np.random.Generator, *, mild: bool) -> Confounders:
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


def draw_pneumonia(rng: np.random.Generator, confounders: Confounders) -> tuple[tuple[Lesion, ...], Confounders]:
    """Opacities of a pneumonia that is not COVID: lobar, peribronchial, nodular, mostly of one lung.

    COVID is peripheral in 80 %, other viral pneumonias in 57 %; the rest are central or both. They show ground glass
    in 68 %, consolidate, and have an effusion in 39 % (Bai et al., Radiology 2020; 296: E46-E54). Airway-borne
    infection spreads along the bronchi as patches and centrilobular nodules, and a lobar pneumonia fills a lobe up to
    the hilum with air bronchograms (Franquet, Radiology 2011; 260: 18-39).
    """
    main = int(rng.choice([-1, 1]))
    bilateral, peripheral = rng.uniform(size=2) < (0.35, 0.57)
    lesions: list[Lesion] = []

    def add(
        count: int, *, angle: tuple[float, float], height: tuple[float, float], depth_mm: tuple[float, float],
        radius_mm: tuple[float, float], opacity: tuple[float, float], side: int | None = None,
    ) -> None:  # fmt: skip
        for _ in range(count):
            other = bilateral and rng.uniform() < 0.4
            lesions.append(
                Lesion(
                    side=side or (-main if other else main),
                    angle=np.deg2rad(rng.normal(*angle)),
                    height=float(np.clip(rng.normal(*height), 0.1, 0.85)),
                    depth_mm=rng.uniform(*depth_mm),
                    radius_mm=rng.uniform(*radius_mm),
                    flattening=rng.uniform(0.75, 1.1),
                    opacity=rng.uniform(*opacity),
                    crazy_paving=bool(rng.uniform() < 0.1),
                )
            )

    lobar = rng.uniform() < 0.6
    if lobar:  # two overlapping masses, from the pleura to the hilum
        where = rng.normal(70, 50), float(rng.choice([0.25, 0.45, 0.68], p=[0.5, 0.3, 0.2]))
        for depth_mm in ((8, 18), (16, 28)) if peripheral else ((14, 24), (34, 50)):
            add(
                1, angle=(where[0], 8), height=(where[1], 0.03), depth_mm=depth_mm,
                radius_mm=(22, 34), opacity=(0.85, 0.97), side=main,
            )  # fmt: skip
    around = (90.0, 75.0)
    patches = int(rng.integers(2, 6) if lobar else rng.integers(5, 11))
    depth_mm = (4, 26) if peripheral else (20, 48)
    add(patches, angle=around, height=(0.42, 0.16), depth_mm=depth_mm, radius_mm=(8, 17), opacity=(0.3, 0.9))
    nodules = int(rng.integers(10, 26))
    add(nodules, angle=around, height=(0.42, 0.2), depth_mm=(8, 45), radius_mm=(3, 5.5), opacity=(0.5, 0.85))
    if rng.uniform() < 0.39:
        thick = rng.uniform(12, 28)
        confounders = replace(
            confounders,
            # Fluid of the sick side alone: the other side's share is less than the eye sees.
            dependent_mm=thick if main < 0 else thick / 25,
            dependent_balance=0.04 if main < 0 else 25.0,
            dependent_opacity=0.97,
            dependent_height=rng.uniform(0.35, 0.6),
        )
    return tuple(lesions), confounders
