"""What works on this machine: Python, devices, storage, decoders, extras."""

import importlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Examined:
    """One line of the doctor's table."""

    part: str
    state: str
    works: bool
    remedy: str = ""
    optional: bool = False


REQUIRED = ("capsfl-kernels", "jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "pydicom", "ecdsa")
DECODERS = (
    ("JPEG Lossless, JPEG-LS", "gdcm", "python-gdcm"),
    ("JPEG 2000", "openjpeg", "pylibjpeg-openjpeg"),
    ("JPEG Lossless, the fast way", "imagecodecs", "imagecodecs"),
)
LIBRARIES = (
    ("weights of Keras", "h5py", "keras"),
    ("capsfl export: weights", "safetensors", "export"),
    ("capsfl export: programs", "flatbuffers", "export"),
)


def examine() -> list[Examined]:
    """Looks at everything a study needs, and at the extras."""
    return list(_examine())


def _examine() -> Iterator[Examined]:
    yield Examined("python", platform.python_version(), True)
    for package in REQUIRED:
        try:
            yield Examined(package, version(package), True)
        except PackageNotFoundError:
            yield Examined(package, "missing", False, f"pip install {package}")
    import jax

    try:
        devices = jax.devices()
        yield Examined("devices", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})", True)
    except RuntimeError as error:
        remedy = "check the accelerator's driver, or set JAX_PLATFORMS=cpu"
        yield Examined("devices", str(error).splitlines()[0], False, remedy)
    yield Examined("compilation cache", os.environ.get("JAX_COMPILATION_CACHE_DIR", "off"), True)
    for syntax, module, package in DECODERS:
        try:
            importlib.import_module(module)
            yield Examined(f"DICOM {syntax}", version(package), True, optional=True)
        except ImportError:
            yield Examined(f"DICOM {syntax}", "missing", False, "pip install 'capsfl[dicom]'", optional=True)
    for part, package, extra in LIBRARIES:
        try:
            yield Examined(part, version(package), True, optional=True)
        except PackageNotFoundError:
            yield Examined(part, "missing", False, f"pip install 'capsfl[{extra}]'", optional=True)
    try:
        yield Examined("DICOM SEG", f"highdicom {version('highdicom')}", True, optional=True)
    except PackageNotFoundError:
        yield Examined("DICOM SEG", "missing", False, "pip install 'capsfl[seg]'", optional=True)
