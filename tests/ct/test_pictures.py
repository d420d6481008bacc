"""Pictures: one reading for every file mode, squares, storage, and files that are none."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from capsfl.ct import errors
from capsfl.ct.picture_files import picture_files, read_picture, read_picture_set, to_square
from capsfl.ct.pictures import PictureSet, read_picture_attributes, read_pictures, write_pictures
from capsfl.ct.volumes import read_volume


@pytest.fixture(scope="module")
def grey():
    """(48, 72) uint8 with every grey value of a soft gradient."""
    y, x = np.mgrid[:48, :72]
    return np.rint(255 * (0.5 + 0.5 * np.sin(y / 9) * np.cos(x / 11))).astype(np.uint8)


MODES = {"png": ["L", "RGB", "RGBA", "LA", "P"], "jpg": ["L", "RGB", "CMYK"], "bmp": ["L", "RGB", "RGBA", "P"]}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_a_grey_picture_reads_the_same_from_every_mode(grey, tmp_path, mode, suffix):
    path = tmp_path / f"a 1%2.{suffix}"
    Image.fromarray(grey).convert(mode).save(path, quality=100)
    # JPEG itself rounds; all else is exact.
    assert np.abs(read_picture(path).astype(int) - grey).max() <= (3 if suffix == "jpg" else 0)


def test_what_is_transparent_is_black(grey, tmp_path):
    image = Image.fromarray(np.dstack([grey, grey, grey, np.where(grey > 128, 255, 0).astype(np.uint8)]))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), np.where(grey > 128, grey, 0))


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_a_square_keeps_its_mean_and_its_sides(grey, fit):
    square = to_square(grey, 24, fit=fit)
    assert (square.shape, square.dtype) == ((24, 24), np.uint8)
    seen = {"stretch": grey, "crop": grey[:, 12:60], "pad": grey}[fit]
    inner = square[4:20] if fit == "pad" else square
    assert inner.mean() == pytest.approx(seen.mean(), abs=1)
    if fit == "pad":
        assert not square[:4].any()
        assert not square[20:].any()
    else:
        assert square[0, 0] == pytest.approx(seen[:2, :2].mean(), abs=12)


def test_reduction_is_antialiased():
    """A fine grating averages out instead of becoming a coarse one."""
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))
    assert np.ptp(to_square(stripes, 48, fit="stretch")[:, 2:-2]) <= 4


def test_standardized_pictures_share_their_mean_and_spread(grey, tmp_path):
    """Whatever window their publisher chose; order and place of the greys stay."""
    dark = (grey // 3 + 20).astype(np.uint8)
    for name, picture in (("a.png", grey), ("b.png", dark), ("c.png", np.full_like(grey, 77))):
        Image.fromarray(picture).save(tmp_path / name)
    paths = tuple(tmp_path / name for name in ("a.png", "b.png", "c.png"))
    first, second, flat = read_picture_set(paths, side=24).pixels.astype(float)
    for square in (first, second):
        assert square.mean() == pytest.approx(127.5, abs=0.5)
        assert square.std() == pytest.approx(48, abs=1)
    assert np.abs(first - second).max() <= 4
    assert np.ptp(flat) == 0
    kept = read_picture_set(paths, side=24, levels="kept").pixels
    np.testing.assert_array_equal(kept[1], to_square(dark, 24, fit="stretch"))


def test_pictures_return_as_they_were(grey, tmp_path):
    pictures = PictureSet(np.stack([to_square(grey, 40, fit="pad")] * 3), np.array([[48, 72]] * 3))
    write_pictures(tmp_path / "a.zarr", pictures, attributes={"patient": "p"})
    back, attributes = read_pictures(tmp_path / "a.zarr")
    np.testing.assert_array_equal(back.pixels, pictures.pixels)
    np.testing.assert_array_equal(back.original_sizes, pictures.original_sizes)
    assert attributes["checksum"].startswith("sha256:")
    assert read_picture_attributes(tmp_path / "a.zarr") == attributes
    with pytest.raises(errors.CorruptVolume, match="format capsfl-pictures 1, not capsfl-volume"):
        read_volume(tmp_path / "a.zarr")
    other = PictureSet(pictures.pixels[::-1, ::-1], pictures.original_sizes)
    write_pictures(tmp_path / "a.zarr", other, attributes={"patient": "p"})
    assert read_picture_attributes(tmp_path / "a.zarr")["checksum"] != attributes["checksum"]


@pytest.mark.parametrize(
    ("pixels", "sizes", "message"),
    [
        (np.zeros((2, 8, 8), np.float32), np.ones((2, 2), int), r"pixels: float32 \(2, 8, 8\)"),
        (np.zeros((2, 8, 9), np.uint8), np.ones((2, 2), int), r"pixels: uint8 \(2, 8, 9\)"),
        (np.zeros((0, 8, 8), np.uint8), np.ones((0, 2), int), r"pixels: uint8 \(0, 8, 8\)"),
        (np.zeros((2, 8, 8), np.uint8), np.ones((3, 2), int), r"original_sizes: int64 \(3, 2\)"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(tmp_path, pixels, sizes, message):
    with pytest.raises(ValueError, match=message):
        write_pictures(tmp_path / "a.zarr", PictureSet(pixels, sizes), attributes={})
    assert not list(tmp_path.iterdir())


def png_bomb(path, side=60_000):
    """A PNG of a few kilobytes that claims billions of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_files_that_are_no_pictures_are_named(grey, tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(grey).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-200])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    png_bomb(tmp_path / "bomb.png")
    Image.fromarray(grey.astype(np.uint16) * 100).save(tmp_path / "deep.png")
    for name, kind, message in (
        ("cut.png", errors.CorruptFile, "pixels cannot be read"),
        ("empty.png", errors.WrongFormat, "not a readable PNG"),
        ("text.jpg", errors.WrongFormat, "not a readable PNG"),
        ("bomb.png", errors.WrongFormat, "pixels; give one CT slice a file"),
        ("deep.png", errors.WrongFormat, "more than 8 bits a pixel"),
        ("absent.png", errors.WrongFormat, "no such file"),
    ):
        with pytest.raises(kind, match=message) as caught:
            read_picture_set((whole, tmp_path / name), side=16, fit="pad")
        assert str(caught.value).startswith(str(tmp_path / name))


def test_a_folder_is_of_pictures_if_it_holds_nothing_else(grey, tmp_path):
    for name in ("b.png", "deep/a.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(grey).save(tmp_path / name)
    (tmp_path / "README.txt").write_text("notes")
    (tmp_path / ".DS_Store").write_text("")
    assert [path.name for path in picture_files(tmp_path)] == ["b.png", "a.JPG"]
    (tmp_path / "slice").write_text("")
    assert picture_files(tmp_path) == ()
