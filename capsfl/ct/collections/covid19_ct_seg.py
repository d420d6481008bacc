"""COVID-19-CT-Seg (Ma et al. 2020, Zenodo 3757476): twenty scans with lungs and lesions drawn."""

from pathlib import Path

from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.entries import Collection, ScanEntry
from capsfl.ct.collections.layout import find, some, wrong
from capsfl.ct.collections.manifest import is_nifti
from capsfl.ct.errors import WrongLayout

WHAT = "COVID-19-CT-Seg"
BOTH = "Lung_and_Infection_Mask"
ALONE = {"lesion": "Infection_Mask", "lungs": "Lung_Mask"}
THRESHOLDS = {"lesion": 2.5, "lungs": 0.5}
"""In the common masks 1 is the left lung, 2 the right one, 3 a lesion, which lies in a lung."""


def read_covid19_ct_seg(root: Path, config: CollectionConfig) -> Collection:
    """Read COVID-19-CT-Seg: `COVID-19-CT-Seg_20cases/*.nii.gz`, masks of the same names in `Lung_and_Infection_Mask/`.

    The names tell two sources, which become the hospitals: `coronacases`, in Hounsfield units, and `radiopaedia`,
    windowed to 8 bits. The reader refuses the latter by name, `--on-error skip` leaves them out, and the preflight
    page lists them: grey values whose window nobody recorded cannot be turned back into Hounsfield units. Every
    patient has COVID.

    Raises:
        WrongLayout: scans or masks are absent, or a scan has no mask.
    """
    scans = find(root, "COVID-19-CT-Seg_20cases", what=WHAT)
    images = [path for path in sorted(scans.iterdir()) if is_nifti(path)]
    if not images:
        raise wrong(scans, f"the scans of {WHAT}", "*.nii.gz")
    folder = find(root, BOTH, ALONE[config.mask], what=WHAT)
    threshold = THRESHOLDS[config.mask] if folder.name == BOTH else 0.5
    masks = {_stem(path): path for path in folder.iterdir() if is_nifti(path)}
    if missing := [path.name for path in images if _stem(path) not in masks]:
        raise WrongLayout(folder, f"no mask for {some(missing)}", "restore it")
    entries = [
        ScanEntry(
            _stem(path),
            "radiopaedia" if path.name.startswith("radiopaedia") else "coronacases",
            path,
            label=1,
            mask=masks[_stem(path)],
            mask_threshold=threshold,
        )
        for path in images
    ]
    return Collection(tuple(entries), ("non-COVID", "COVID"))


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
