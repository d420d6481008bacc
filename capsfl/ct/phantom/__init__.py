"""Seeded synthetic chest CT: hospitals of patients, written as DICOM series with lesion masks."""

from capsfl.ct.phantom.anatomy import Anatomy, patient
from capsfl.ct.phantom.cohort import PhantomConfig
from capsfl.ct.phantom.hospitals import PhantomMismatch, write_hospitals
from capsfl.ct.phantom.scanners import SCANNERS, Geometry, Scanner, acquire

__all__ = [
    "SCANNERS",
    "Anatomy",
    "Geometry",
    "PhantomConfig",
    "PhantomMismatch",
    "Scanner",
    "acquire",
    "patient",
    "write_hospitals",
]
