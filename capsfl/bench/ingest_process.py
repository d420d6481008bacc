"""One way to turn a DICOM series into a standard volume, in a process of its own.

python ingest_process.py NAME

Reads requests as lines of JSON, answers each with one. It runs with the interpreter that has the library, so that
nothing of ours is imported before ours is asked for.
"""

import contextlib
import ctypes
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

CUBE_MM = 128.0
"""Side of the cube whose mean every contestant tells, so that a wrong result is noticed."""


def capsfl() -> tuple[str, Callable[..., float]]:
    """Ours, whole: lungs and body sought, resampled, compressed, checksummed, written, listed."""
    from importlib.metadata import version

    import numpy as np

    from capsfl.ct.ingest import ingest, read_index
    from capsfl.ct.normalize import VolumeConfig
    from capsfl.ct.volumes import read_volume

    def run(series: str, out: str, _: dict[str, Any]) -> Any:
        return ingest(Path(series), Path(out), config=VolumeConfig(preset="half"), processes=1, progress=False)

    def mean(_: Any, out: str, center: list[float]) -> float:
        (entry,) = read_index(Path(out))
        volume, _ = read_volume(entry.path)
        index = (np.linalg.inv(volume.affine) @ [*center, 1])[:3]
        return _cube_mean(volume.hu, index, volume.spacing_mm)

    return version("capsfl"), _both(run, mean)


def simpleitk(*, antialiased: bool = False) -> tuple[str, Callable[..., float]]:
    """Series reader, orientation, one linear resampling to the grid of our volume, the window.

    Args:
        antialiased: smooth first, by the Gaussian that takes the scan's voxels to the size of the volume's.
    """
    import numpy as np
    import SimpleITK as sitk  # pyright: ignore[reportMissingImports]

    def run(series: str, _: str, grid: dict[str, Any]) -> Any:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(series))
        image = sitk.Cast(sitk.DICOMOrient(reader.Execute(), "LPS"), sitk.sitkFloat32)
        if antialiased:
            sizes = zip(image.GetSpacing(), grid["spacing"], strict=True)
            sigma = [0.5 * max(wanted**2 - has**2, 1e-4) ** 0.5 for has, wanted in sizes]
            image = sitk.SmoothingRecursiveGaussian(image, sigma)
        identity = sitk.Transform(3, sitk.sitkIdentity)
        place = grid["size"], identity, sitk.sitkLinear, grid["origin"], grid["spacing"], image.GetDirection()
        image = sitk.Resample(image, *place, -1000.0)
        return sitk.IntensityWindowing(image, -1400.0, 200.0, -0.5, 0.5)

    def mean(image: Any, _: str, center: list[float]) -> float:
        index = image.TransformPhysicalPointToContinuousIndex(center)[::-1]
        return _cube_mean(sitk.GetArrayViewFromImage(image), np.array(index), image.GetSpacing()[::-1]) * 1600 - 600

    return sitk.Version.VersionString(), _both(run, mean)


def monai() -> tuple[str, Callable[..., float]]:
    """LoadImage, Orientation, Spacing, ScaleIntensityRange, in float32."""
    import monai as library  # pyright: ignore[reportMissingImports]
    import numpy as np
    from monai.transforms import (  # pyright: ignore[reportMissingImports]
        Compose,
        LoadImage,
        Orientation,
        ScaleIntensityRange,
        Spacing,
    )

    def run(series: str, _: str, grid: dict[str, Any]) -> Any:
        steps = [
            LoadImage(reader="PydicomReader", ensure_channel_first=True, dtype=np.float32),
            Orientation(axcodes="RAS", labels=None),
            Spacing(pixdim=grid["spacing"], mode="bilinear", dtype=np.float32),
            ScaleIntensityRange(a_min=-1400.0, a_max=200.0, b_min=-0.5, b_max=0.5, clip=True),
        ]
        return Compose(steps)(series)

    def mean(image: Any, _: str, center: list[float]) -> float:
        x, y, z = center
        affine = np.asarray(image.affine, float)
        index = (np.linalg.inv(affine) @ [-x, -y, z, 1])[:3]
        return _cube_mean(image[0].numpy(), index, np.linalg.norm(affine[:3, :3], axis=0)) * 1600 - 600

    return library.__version__, _both(run, mean)


def _both(run: Callable[..., Any], mean: Callable[..., float]) -> Callable[..., Any]:
    def either(series: str, out: str, grid: dict[str, Any], *, check: bool) -> tuple[float | None, float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        made = run(series, out, grid)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return (mean(made, out, grid["center"]) if check else None), wall, cpu

    return either


def _cube_mean(values: Any, index: Any, spacing_mm: Any) -> float:
    """Mean of the cube around an index, windowed to -1400..200 HU as the peers' volumes are."""
    low = [max(0, round(at - CUBE_MM / 2 / step)) for at, step in zip(index, spacing_mm, strict=True)]
    high = [max(1, round(at + CUBE_MM / 2 / step)) for at, step in zip(index, spacing_mm, strict=True)]
    cube = values[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return float(cube.clip(-1400, 200).mean() if cube.min() < -1 else cube.mean())


CONTESTANTS = {
    "capsfl": capsfl,
    "MONAI": monai,
    "SimpleITK": simpleitk,
    "SimpleITK, antialiased": partial(simpleitk, antialiased=True),
}


def serve(name: str) -> None:
    """Answers requests until none comes any more."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    try:
        version, run = CONTESTANTS[name]()
    except ImportError as error:
        print(json.dumps({"error": f"{error.name or error} is not installed"}), file=channel, flush=True)
        return
    print(json.dumps({"version": version}), file=channel, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        shutil.rmtree(request["out"], ignore_errors=True)
        try:
            before = _start_peak_anew() if request["memory"] else None
            mean, wall, cpu = run(request["series"], request["out"], request["grid"], check=request["check"])
            peak = None if before is None else max(0, _memory("VmHWM") - before)
            answer = {"wall_s": wall, "cpu_s": cpu, "mean_hu": mean, "peak_bytes": peak}
        except Exception as error:  # another's library may raise anything, and the others go on
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"}
        print(json.dumps(answer), file=channel, flush=True)


def _start_peak_anew() -> int | None:
    """Gives freed memory back and starts the process's peak anew; bytes it holds now, None where none can tell."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _memory("VmRSS")
    return None


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    serve(sys.argv[1])
