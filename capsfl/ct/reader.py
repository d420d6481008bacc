"""What the readers mend when they are asked to, and the size at which they refuse."""

from pydantic import Field

from capsfl.settings import Settings


class ReaderConfig(Settings):
    """How scans are read. Whatever is mended is recorded in the scan's source facts."""

    allow_interpolation: bool = False
    """Fill missing slices linearly between their neighbours; refused when False."""
    max_gap_slices: int = Field(default=3, ge=1)
    """Longest run of missing slices that allow_interpolation fills; a longer one is refused."""
    allow_tilt_correction: bool = False
    """Undo a gantry tilt by shearing the slices, linearly in their plane; refused when False."""
    max_voxels: int = Field(default=2**29, ge=1)
    """Largest scan that is read, in voxels: 2048 slices of 512x512; what declares more is refused unread."""
