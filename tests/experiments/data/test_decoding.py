"""Images of every kind become what torchvision's loader makes of them, keep their values, or are refused by name."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from jpegs import jpeg
from PIL import Image, ImageCms, PngImagePlugin
from torchvision.datasets.folder import pil_loader

from sparselearning.experiments.data import photographs as images
from sparselearning.experiments.data.decoding import open_image, to_rgb
from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.data.image_sources import FolderSource

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encoded(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def rgb(content):
    return np.asarray(to_rgb(open_image(content)))


def one_photograph(tmp_path, content, size=16, name="0.jpg"):
    """Return the only photograph of a folder, as evaluation takes it."""
    path = tmp_path / "a" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return images.Photographs(FolderSource(tmp_path), size, train=False)


def with_orientation(image, number):
    exif = Image.Exif()
    exif[274] = number
    return encoded(image, "JPEG", exif=exif)


def animation(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    more = {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **more)


def palette_with_transparency():
    image = Image.fromarray(COLOURS).quantize(8)
    return encoded(image, "PNG", transparency=bytes([0, 128, 255]))


KINDS = {
    "grey": lambda: encoded(Image.fromarray(RAMP), "JPEG"),
    "CMYK": lambda: encoded(Image.fromarray(COLOURS).convert("CMYK"), "JPEG"),
    "palette": lambda: encoded(Image.fromarray(COLOURS).quantize(16), "PNG"),
    "palette with transparency": palette_with_transparency,
    "grey with transparency": lambda: encoded(Image.fromarray(COLOURS).convert("LA"), "PNG"),
    "colours with transparency": lambda: encoded(Image.fromarray(COLOURS).convert("RGBA"), "PNG"),
    "one bit": lambda: encoded(Image.fromarray(RAMP > 100), "PNG"),
    "GIF": lambda: encoded(Image.fromarray(COLOURS), "GIF"),
    "animated GIF": lambda: animation("GIF"),
    "animated WebP": lambda: animation("WEBP"),
    "animated PNG": lambda: animation("PNG"),
    "two pages": lambda: animation("TIFF"),
    "turned by EXIF": lambda: with_orientation(Image.fromarray(COLOURS[:12]), 6),
    "mirrored by EXIF": lambda: with_orientation(Image.fromarray(COLOURS), 2),
    "with a colour profile": lambda: encoded(
        Image.fromarray(COLOURS), "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ),
    "BMP": lambda: encoded(Image.fromarray(COLOURS), "BMP"),
    "PPM": lambda: encoded(Image.fromarray(COLOURS), "PPM"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_becomes_what_torchvision_makes_of_it(tmp_path, kind):
    content = KINDS[kind]()
    (tmp_path / "image").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the transparency of palettes
        expected, found = np.asarray(pil_loader(tmp_path / "image")), rgb(content)
    assert found.shape == expected.shape
    assert (found == expected).all()
    image, label = one_photograph(tmp_path, content)[0, 0]
    assert (image.shape, label) == ((3, 16, 16), 0)


def test_an_image_is_not_turned_as_its_exif_data_says():
    assert rgb(with_orientation(Image.fromarray(COLOURS[:12]), 6)).shape == (12, 16, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(kind):
    assert (rgb(animation(kind)) == (255, 0, 0)).all()


def tiff(pixels, bits, kind=1, photometric=1):
    """Return an uncompressed TIFF file, little-endian, of one row of grey pixels; of kind 1 (unsigned) or 2."""
    entries = [
        (256, 4, pixels.size if bits != 12 else pixels.size * 8 // 12), (257, 4, 1), (258, 3, bits), (259, 3, 1),
        (262, 3, photometric), (273, 4, 200), (277, 3, 1), (278, 4, 1), (279, 4, pixels.nbytes), (339, 3, kind),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)
    return head.ljust(200, b"\0") + pixels.tobytes()


def png_16(pixels):
    """Return a PNG of colours [H, W, 3] with 16 bits."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pgm(pixels, most):
    height, width = pixels.shape
    return b"P5 %d %d %d\n" % (width, height, most) + pixels.astype(">u2").tobytes()


WIDE = RAMP.astype(np.uint16) * 257  # 0 to 65535
SIXTEEN = {
    "PNG": lambda: encoded(Image.fromarray(WIDE), "PNG"),
    "TIFF": lambda: encoded(Image.fromarray(WIDE), "TIFF"),
    "TIFF, big-endian": lambda: encoded(Image.fromarray(WIDE.astype(">u2")), "TIFF"),
    "TIFF, compressed": lambda: encoded(Image.fromarray(WIDE), "TIFF", compression="tiff_lzw"),
    "TIFF by hand": lambda: tiff(WIDE, 16),
    "PGM": lambda: pgm(WIDE, 65535),
    "PGM of 10 bits": lambda: pgm((RAMP.astype(int) * 1023 + 127) // 255, 1023),
    "JPEG 2000": lambda: encoded(Image.fromarray(WIDE), "JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_sixteen_bits_of_grey_keep_their_values(tmp_path, kind):
    found = rgb(SIXTEEN[kind]()).reshape(256, 3)
    assert np.abs(found.astype(int) - np.arange(256)[:, None]).max() <= 1
    image, _ = one_photograph(tmp_path, SIXTEEN[kind]())[0, 0]
    assert 100 < image.float().mean() < 150
    assert image.float().std() > 50 or kind == "TIFF by hand"  # of one row


@pytest.mark.parametrize("train", [True, False])
def test_sixteen_bits_keep_their_values_where_they_shrink(tmp_path, train):
    folder = tmp_path / "a"
    folder.mkdir()
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    (folder / "0.png").write_bytes(encoded(Image.fromarray(ramp), "PNG"))
    image, _ = images.Photographs(FolderSource(tmp_path), 16, train=train)[1, 0]
    assert len(image.unique()) > 8


def test_twelve_bits_and_white_at_zero_keep_their_values():
    twelve = np.frombuffer(
        b"".join(bytes([v >> 4, (v & 15) << 4 | v >> 8, v & 255]) for v in (0, 1024, 2048, 4095)), np.uint8
    )
    assert rgb(tiff(twelve, 12))[0, ::2, 0].tolist() == [0, 64, 128, 255]
    assert rgb(tiff(WIDE, 16, photometric=0)).reshape(256, 3)[:, 0].tolist() == [*range(255, -1, -1)]


def test_sixteen_bits_of_colours_keep_their_values():
    wide = COLOURS.astype(np.uint16) * 257
    assert (rgb(png_16(wide)) == COLOURS).all()
    assert rgb(b"P6 16 16 65535\n" + wide.astype(">u2").tobytes()).tolist() == COLOURS.tolist()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (lambda: encoded(Image.fromarray(RAMP / np.float32(255)), "TIFF"), "floating-point numbers"),
        (lambda: encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "32 bits, or signed"),
        (lambda: tiff(RAMP.astype(np.int16), 16, kind=2), "32 bits, or signed"),
        (lambda: b"Pf 16 16 -1\n" + RAMP.astype(np.float32).tobytes(), "floating-point numbers"),
    ],
)
def test_numbers_of_no_known_range_are_refused(tmp_path, content, kind):
    with pytest.raises(DataError, match=rf"a/0\.jpg cannot be read: its pixels are {kind}, of no known range: convert"):
        one_photograph(tmp_path, content())[0, 0]


def bomb():
    """Return a small PNG that claims 20,000 x 20,000 pixels."""
    content = encoded(Image.new("1", (16, 16)), "PNG")
    head = struct.pack(">II", 20_000, 20_000) + content[24:29]
    return content[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + content[33:]


def text_bomb():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    return encoded(Image.fromarray(COLOURS), "PNG", pnginfo=text)


BAD = {
    "empty": (lambda: b"", "it is empty"),
    "text": (lambda: b"<html>404</html>", "it is no image of a known format"),
    "cut JPEG": (lambda: jpeg(0, 0)[:700], "truncated"),
    "header alone": (lambda: jpeg(0, 0)[:30], "."),
    "cut PNG": (lambda: encoded(Image.fromarray(COLOURS), "PNG")[:300], "truncated"),
    "PNG with a wrong checksum": (lambda: encoded(Image.fromarray(COLOURS), "PNG").replace(b"IDATx", b"IDATy"), "."),
    "bomb": (bomb, "exceeds limit"),
    "text bomb": (text_bomb, "too large"),
    "no width": (lambda: b"P5 0 4 255\n1234", "."),
    "cut TIFF": (lambda: SIXTEEN["TIFF"]()[:150], "."),
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_decoded_is_named(tmp_path, kind, train):
    content, message = BAD[kind]
    photographs = one_photograph(tmp_path, content())
    photographs.train = train
    with pytest.raises(DataError, match=rf"^\S+/a/0\.jpg cannot be read: .*{message}") as error:
        photographs[1, 0]
    assert "\n" not in str(error.value)
    assert " at 0x" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(), PermissionError(13, "Permission denied", "somewhere"), ValueError("two\nlines"), KeyError("x")),
        *(MemoryError(), struct.error("unpack requires"), IndexError(), RecursionError("deep"), AssertionError()),
        *(zlib.error("Error -3"), EOFError(), OverflowError("big"), TypeError("none"), AttributeError("none")),
    ],
)
def test_whatever_an_image_raises_names_it_in_one_line(tmp_path, monkeypatch, error):
    photographs = one_photograph(tmp_path, jpeg(0, 0))

    def fail(*_):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(
        DataError, match=r"^\S+/a/0\.jpg cannot be read: \S.*\. Replace it, or let --skip-bad-images N"
    ) as raised:
        photographs[1, 0]
    assert "\n" not in str(raised.value)


def test_an_image_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    photographs = one_photograph(tmp_path, jpeg(0, 0))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(DataError, match=r"a/0\.jpg cannot be read: Permission denied\. "):
        photographs[1, 0]


def test_a_folder_named_like_an_image_and_a_lost_file_are_named(tmp_path):
    photographs = one_photograph(tmp_path, jpeg(0, 0))
    (tmp_path / "a" / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"a/0\.jpg cannot be read: No such file or directory\. "):
        photographs[1, 0]
    (tmp_path / "a" / "0.jpg").mkdir()
    with pytest.raises(DataError, match=r"a/0\.jpg cannot be read: it is a folder\. "):
        photographs[1, 0]


def test_a_large_photograph_is_no_bomb_and_gives_no_warning(tmp_path, monkeypatch):
    photographs = one_photograph(tmp_path, jpeg(0, 0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70 * 50 - 1)
    image, _ = photographs[1, 0]  # a warning is an error here
    assert image.float().std() > 5
