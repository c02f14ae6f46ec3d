"""Opening pictures: every mode becomes the right RGB, and what is broken, hostile or huge is refused by a sentence."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from haori.core.errors import DataError
from haori.data.pictures.opening import open_mask, open_picture
from tests.pictures import picture


def rgb(path: Path) -> np.ndarray:
    return np.asarray(open_picture(path, path.name).image)


def test_a_plain_picture_is_what_it_was(tmp_path: Path):
    picture(1).save(tmp_path / "a.png")
    opened = open_picture(tmp_path / "a.png", "a.png")
    assert (np.asarray(opened.image) == np.asarray(picture(1))).all()
    assert opened.alpha is None
    assert opened.notes == ()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int):
    """The reference is the standard's table: where the 0th row and column of the stored picture lie when shown."""
    upright = np.asarray(picture(2, (48, 32)))
    stored = {
        2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    opened = open_picture(tmp_path / "a.png", "a.png")
    assert opened.image.size == (48, 32)
    assert (np.asarray(opened.image) == upright).all()
    assert opened.notes == ("turned by EXIF",)


def test_transparency_is_composed_on_white(tmp_path: Path):
    values = np.zeros((8, 8, 4), dtype=np.uint8)
    values[..., 0] = 200
    values[:4, :, 3], values[4:, :, 3] = 255, 51  # opaque, and a fifth
    Image.fromarray(values).save(tmp_path / "a.png")
    opened = open_picture(tmp_path / "a.png", "a.png")
    shown = np.asarray(opened.image)
    assert (shown[0, 0] == [200, 0, 0]).all()
    assert np.abs(shown[7, 7].astype(int) - [244, 204, 204]).max() <= 1  # 0.2 x colour + 0.8 x 255
    assert opened.alpha is not None
    assert np.asarray(opened.alpha)[7, 7] == 51
    assert opened.notes == ("alpha on white",)


def test_an_alpha_channel_that_hides_nothing_is_no_change(tmp_path: Path):
    picture(1, mode="RGBA").save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png", "a.png").notes == ()


def test_a_transparent_colour_of_a_palette_becomes_white(tmp_path: Path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    shown = rgb(tmp_path / "a.png")
    assert (shown[0, 0] == 255).all()
    assert (shown[3, 3] == [10, 20, 30]).all()


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path):
    values = np.array([[0, 257 * 100], [32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    opened = open_picture(tmp_path / "a.png", "a.png")
    assert np.asarray(opened.image)[..., 0].tolist() == [[0, 100], [128, 255]]
    assert opened.notes == ("16-bit",)


def png(width: int, height: int, colour_type: int, depth: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_of_colour_are_said(tmp_path: Path):
    row = b"\0" + struct.pack(">6H", 65535, 0, 257 * 7, 257 * 200, 257 * 3, 65535)
    (tmp_path / "a.png").write_bytes(png(2, 1, 2, 16, row))
    opened = open_picture(tmp_path / "a.png", "a.png")
    assert np.asarray(opened.image).tolist() == [[[255, 0, 7], [200, 3, 255]]]
    assert opened.notes == ("16-bit",)


@pytest.mark.parametrize(("mode", "note"), [("CMYK", "CMYK"), ("L", None), ("1", None)])
def test_other_modes_become_rgb(tmp_path: Path, mode: str, note: str | None):
    ending = "jpg" if mode == "CMYK" else "png"
    picture(3).convert(mode).save(tmp_path / f"a.{ending}", quality=100)
    opened = open_picture(tmp_path / f"a.{ending}", "a")
    expected = np.asarray(picture(3).convert(mode).convert("RGB")).astype(int)
    assert np.abs(np.asarray(opened.image).astype(int) - expected).mean() < 3
    assert opened.notes == ((note,) if note else ())


def test_a_palette_is_said(tmp_path: Path):
    picture(3).quantize(16).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png", "a").notes == ("palette",)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, ending: str):
    first = Image.new("RGB", (16, 16), (250, 0, 0))
    path = tmp_path / f"a.{ending}"
    first.save(path, save_all=True, append_images=[Image.new("RGB", (16, 16), (0, 0, 250))])
    opened = open_picture(path, "a")
    assert "first frame of an animation" in opened.notes
    assert np.asarray(opened.image)[8, 8, 0] > 200


def linear_profile(space: bytes = b"RGB ") -> bytes:
    """Return a colour profile laid out by ICC.1:2001-04: the primaries of sRGB, values in proportion to light."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(*values)

    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    text = b"linear\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(4 + 4 + 2 + 1 + 67)
    tags = {
        b"desc": described, b"wtpt": xyz(0.9642, 1.0, 0.8249), b"rXYZ": xyz(0.4360, 0.2225, 0.0139),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971), b"bXYZ": xyz(0.1431, 0.0606, 0.7141), b"rTRC": curve, b"gTRC": curve,
        b"bTRC": curve, b"kTRC": curve,
    }  # fmt: skip
    table, body, offset = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = bytes(8) + struct.pack(">I", 0x02400000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += fixed(0.9642, 1.0, 0.8249) + bytes(48)
    whole = head + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_colours_of_another_profile_become_those_of_srgb(tmp_path: Path, mode: str):
    """Half of the light is 187.5 of 255 by the curve of sRGB (IEC 61966-2-1): 1.055 x 0.502^(1/2.4) - 0.055."""
    image = Image.new("RGB", (4, 4), (128, 0, 255) if mode != "L" else (128, 128, 128)).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=linear_profile(b"GRAY" if mode == "L" else b"RGB "))
    opened = open_picture(tmp_path / "a.png", "a.png")
    expected = 255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055)
    wanted = [expected] * 3 if mode == "L" else [expected, 0, 255]
    assert np.abs(np.asarray(opened.image)[0, 0] - np.array(wanted)).max() <= 2
    assert opened.notes == ("colour profile to sRGB",)


def test_srgb_and_unreadable_profiles_change_nothing(tmp_path: Path):
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for raw, notes in ((own, ()), (b"no profile", ("unreadable colour profile",))):
        picture(1).save(tmp_path / "a.png", icc_profile=raw)
        opened = open_picture(tmp_path / "a.png", "a.png")
        assert (np.asarray(opened.image) == np.asarray(picture(1))).all()
        assert opened.notes == notes


def test_a_mask_is_read_as_grey(tmp_path: Path):
    Image.new("L", (8, 8), 128).save(tmp_path / "m.png")
    assert np.asarray(open_mask(tmp_path / "m.png", "m.png"))[0, 0] == 128


def bomb(tmp_path: Path) -> bytes:
    return png(60_000, 60_000, 0, 8, b"\0")


def cut_jpeg(tmp_path: Path) -> bytes:
    buffer = io.BytesIO()
    picture(5, (256, 256)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def bad_checksum(tmp_path: Path) -> bytes:
    buffer = io.BytesIO()
    picture(5).save(buffer, "PNG")
    raw = bytearray(buffer.getvalue())
    raw[len(raw) // 2] ^= 0xFF
    return bytes(raw)


def postscript(tmp_path: Path) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"


@pytest.mark.parametrize(("made", "said"), [
    (lambda _: b"", r"a.png is empty \(0 bytes\)"),
    (lambda _: b"no picture at all", "a.png is no picture in a format that is read"),
    (postscript, "a.png is no picture in a format that is read"),
    (cut_jpeg, "a.png is broken"),
    (bad_checksum, "a.png is broken"),
    (bomb, "a.png has .* pixels"),
    (lambda _: png(12_000, 8_000, 0, 8, b"\0"), "12,000 x 8,000 pixels"),
    (lambda _: b"\x89PNG\r\n\x1a\n" + b"\xff" * 40, "a.png is"),
])  # fmt: skip
def test_broken_and_hostile_files_are_refused_by_a_sentence(tmp_path: Path, made, said: str):
    (tmp_path / "a.png").write_bytes(made(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=said):
            open_picture(tmp_path / "a.png", "a.png")


def test_a_file_that_is_gone_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"b.png cannot be read: No such file"):
        open_picture(tmp_path / "b.png", "b.png")


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_end_in_a_picture_or_a_sentence(tmp_path: Path, seed: int):
    random = np.random.default_rng(seed)
    buffer = io.BytesIO()
    kind = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")[seed % 6]
    picture(seed).save(buffer, kind)
    raw = np.frombuffer(buffer.getvalue(), dtype=np.uint8).copy()
    raw[random.integers(0, len(raw), size=12)] = random.integers(0, 256, size=12)
    (tmp_path / "a.png").write_bytes(raw.tobytes())
    try:
        opened = open_picture(tmp_path / "a.png", "a.png")
    except DataError as error:
        assert str(error).startswith("a.png ")
    else:
        assert opened.image.mode == "RGB"
