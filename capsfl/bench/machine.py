"""What a result was measured on, and the file it goes to."""

import json
import os
import platform
import re
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax


def describe() -> dict[str, Any]:
    """Device, processor, versions and date; JSON-ready."""
    device = jax.devices()[0]
    accelerated = device.platform != "cpu"
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "gpu": device.device_kind if device.platform == "gpu" else None,
        "note": "" if accelerated else "no GPU or TPU was available; every figure is of this processor",
        "driver": _driver() if accelerated else None,
        "cpu_model": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": _version("jaxlib")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def result_path(folder: Path, result: dict[str, Any]) -> Path:
    """Where a result belongs: ``<benchmark>-cpu.json`` or ``<benchmark>-<platform>-<device>.json``."""
    place = result["machine"]
    words = [result["benchmark"], place["platform"]]
    if place["platform"] != "cpu":
        words.append(re.sub(r"[^a-z0-9]+", "-", place["device"].lower()).strip("-"))
    return folder / f"{'-'.join(words)}.json"


def write_result(folder: Path, result: dict[str, Any]) -> Path:
    """Writes one result, in place of an earlier one of the same device."""
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(folder, result)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def results_folder(out: Path | None) -> Path:
    """Where results go: as given, else ``benchmarks/results`` of the checkout at hand.

    Raises:
        ValueError: no folder is given and the current one is not a checkout.
    """
    if out is not None:
        return out
    folder = Path("benchmarks") / "results"
    if not folder.is_dir():
        raise ValueError("out: there is no benchmarks/results here; give --out FOLDER for the results")
    return folder


def available_memory_bytes() -> int:
    """Physical memory that nobody uses at the moment, caches of files included."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])  # pyright: ignore[reportOptionalSubscript]
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor() or "unknown"


def _driver() -> str | None:
    """The driver of an NVIDIA card, or what the runtime calls itself."""
    if shutil.which("nvidia-smi"):
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode == 0 and asked.stdout.strip():
            return f"NVIDIA {asked.stdout.splitlines()[0].strip()}"
    return jax.devices()[0].client.platform_version.splitlines()[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
