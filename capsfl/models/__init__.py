"""Capsule networks for classification and segmentation, and the fusion of three planes."""

from capsfl.models.capsnet import CapsNet, CapsNetConfig, CapsNetOutput
from capsfl.models.efficient_capsnet import EfficientCapsNet, EfficientCapsNetConfig
from capsfl.models.segcaps import SegCaps, SegCapsConfig, SegCapsOutput

__all__ = [
    "CapsNet",
    "CapsNetConfig",
    "CapsNetOutput",
    "EfficientCapsNet",
    "EfficientCapsNetConfig",
    "SegCaps",
    "SegCapsConfig",
    "SegCapsOutput",
]
