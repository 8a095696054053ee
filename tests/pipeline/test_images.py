"""Images of every mode, and images that cannot be read."""

import errno
import gc
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torchvision
from helpers import make_image_folder, photo
from PIL import Image
from torch.utils.data import Dataset

from pipeline import images as images_module
from pipeline.images import ReadableImages
from utils import BadImageError, quiet_warnings

# Modes

RGB = np.asarray(photo(0))[:30]
"""[30, 40, 3]: not square."""
GREY, ALPHA, RGBA = RGB[..., 0], RGB[..., 1], RGB[..., [0, 1, 2, 1]]
LEVELS = np.array([[0, 128, 129, 257, 1000, 32768, 65534, 65535]], dtype=np.uint16)
LEVELS_IN_8_BITS = np.array([[0, 0, 1, 1, 4, 128, 255, 255]])


def three(grey):
    return np.stack([grey] * 3, axis=-1)


PHOTO, NEGATIVE = Image.fromarray(RGB), Image.fromarray(255 - RGB)
PALETTE, OTHER_PALETTE = PHOTO.quantize(16), NEGATIVE.quantize(16)
PALETTE_COLOURS = np.array(PALETTE.getpalette()).reshape(-1, 3)[np.asarray(PALETTE)]
CMYK = Image.fromarray(RGBA, mode="CMYK")
INVERSE = 255.0 - RGBA
GREY_16, LEVELS_16 = Image.fromarray(GREY.astype(np.uint16) * 257), Image.fromarray(LEVELS)
BIG_ENDIAN = Image.frombytes("I;16B", LEVELS.shape[::-1], LEVELS.astype(">u2").tobytes())
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # by 90 degrees

READABLE = {
    "rgb.png": (PHOTO, {}, RGB),
    "rgba.png": (Image.fromarray(RGBA), {}, RGB),
    "rgba.webp": (Image.fromarray(RGBA), {"lossless": True, "exact": True}, RGB),
    "grey.png": (Image.fromarray(GREY), {}, three(GREY)),
    "grey-alpha.png": (Image.fromarray(np.dstack([GREY, ALPHA])), {}, three(GREY)),
    "one-bit.png": (Image.fromarray(GREY > 128), {}, three((GREY > 128) * 255)),
    "palette.png": (PALETTE, {}, PALETTE_COLOURS),
    "palette-clear.png": (PALETTE, {"transparency": 3}, PALETTE_COLOURS),
    "palette-clear.gif": (PALETTE, {"transparency": 3}, PALETTE_COLOURS),
    "palette-alpha.png": (PALETTE, {"transparency": bytes(range(0, 256, 16))}, PALETTE_COLOURS),
    "rgb-clear.png": (PHOTO, {"transparency": tuple(map(int, RGB[0, 0]))}, RGB),
    "cmyk.tif": (CMYK, {}, INVERSE[..., :3] * INVERSE[..., 3:] / 255),
    "animation.gif": (PALETTE, {"save_all": True, "append_images": [OTHER_PALETTE]}, PALETTE_COLOURS),
    "animation.png": (PHOTO, {"save_all": True, "append_images": [NEGATIVE]}, RGB),
    "rotated.png": (PHOTO, {"exif": ROTATED}, RGB),
    "pages.tif": (PHOTO, {"save_all": True, "append_images": [NEGATIVE]}, RGB),
    "8-in-16.png": (GREY_16, {}, three(GREY)),
    "8-in-16.pgm": (GREY_16, {}, three(GREY)),
    "16.png": (LEVELS_16, {}, three(LEVELS_IN_8_BITS)),
    "16.pgm": (LEVELS_16, {}, three(LEVELS_IN_8_BITS)),
    "16.tif": (LEVELS_16, {}, three(LEVELS_IN_8_BITS)),
    "16-big-endian.tif": (BIG_ENDIAN, {}, three(LEVELS_IN_8_BITS)),
    "32.tif": (Image.fromarray(LEVELS.astype(np.int32)), {}, three(LEVELS_IN_8_BITS)),
}
"""{file: (image, options of its `save`, pixels)}"""
JPEG = {
    "rotated.jpg": (PHOTO, {"exif": ROTATED}),
    "cmyk.jpg": (CMYK, {}),
    "grey.jpg": (Image.fromarray(GREY), {}),
}


class Photos(Dataset):
    """A few images in memory; `reads` lists those that were read, in order."""

    def __init__(self):
        self.reads = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.reads.append(index)
        return photo(index), index


def folder_with(root, name, write):
    """A torchvision folder of one class; `write` makes its only image."""
    (root / "class").mkdir()
    path = root / "class" / name
    path.write_bytes(b"")
    source = torchvision.datasets.ImageFolder(root, is_valid_file=os.path.isfile)
    write(path)
    return source


@pytest.mark.parametrize("name", READABLE)
def test_every_mode_becomes_rgb(tmp_path, name):
    original, options, expected = READABLE[name]
    source = folder_with(tmp_path, name, lambda path: original.save(path, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_warnings()
        image, label = ReadableImages(source, np.asarray, max_bad=0)[0]
    assert label == 0
    assert (image.dtype, image.shape) == (np.uint8, expected.shape)
    assert np.abs(image - expected.astype(float)).max() <= (1 if name == "cmyk.tif" else 0)


@pytest.mark.parametrize("name", ["rgb.png", "palette.png", "rgba.png", *JPEG])
def test_common_images_are_read_as_torchvision_and_timm_do(tmp_path, name):
    """JPEG files too, which DeiT trained on."""
    original, options, *_ = (READABLE | JPEG)[name]
    source = folder_with(tmp_path, name, lambda path: original.save(path, **options))
    image, _ = ReadableImages(source, np.asarray, max_bad=0)[0]
    assert np.array_equal(image, np.asarray(source[0][0]))
    assert np.array_equal(image, np.asarray(timm.data.ImageDataset(str(tmp_path))[0][0]))


def test_images_of_a_source_that_decodes_them_itself():
    class Source(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Image.fromarray(LEVELS), 5

    image, label = ReadableImages(Source(), np.asarray, max_bad=0)[0]
    assert (label, image.tolist()) == (5, three(LEVELS_IN_8_BITS).tolist())


# Images that cannot be read


def half(path, image=None, **options):
    (image or photo(0)).save(path, **options)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def wrong_checksum(path):
    photo(0).save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 50] ^= 255
    path.write_bytes(content)


def refused(path):
    photo(0).save(path)
    path.chmod(0)


UNREADABLE = {
    "half.png": half,
    "half.jpg": half,
    "half.gif": half,
    "half.bmp": half,
    "half.webp": half,
    "half.tif": half,
    "half-packed.tif": lambda path: half(path, compression="tiff_lzw"),
    "half-16.png": lambda path: half(path, GREY_16),
    "zero.jpg": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_bytes(b"this is no picture"),
    "noise.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "checksum.png": wrong_checksum,
    "vanished.png": lambda path: path.unlink(),
    "refused.png": refused,
}


@pytest.fixture
def permissions(monkeypatch):
    """Let files that nobody may read be refused to root too."""

    def refusing(path, mode):
        if not Path(path).stat().st_mode & 0o400:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, mode)

    monkeypatch.setattr(images_module, "open", refusing, raising=False)


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_images(tmp_path, name, permissions):
    source = folder_with(tmp_path, name, UNREADABLE[name])
    images = ReadableImages(source, np.asarray, max_bad=0)
    for _ in range(2):  # it does not count as replaced the second time
        with pytest.raises(BadImageError, match=rf"^unreadable image .*{name}: .+ \(number 1; 0 may be replaced\)$"):
            images[0]
    assert images.num_bad == 0


def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch):
    """It has more than twice PIL's limit of pixels."""
    source = folder_with(tmp_path, "bomb.png", photo(0).save)
    images = ReadableImages(source, np.asarray, max_bad=0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    assert np.array_equal(images[0][0], np.asarray(photo(0)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 799)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", pytest.fail)
    with pytest.raises(BadImageError, match="decompression bomb"):
        images[0]


def test_any_error_of_a_decoder_is_a_bad_image(tmp_path, monkeypatch):
    source = folder_with(tmp_path, "rgb.png", photo(0).save)
    images = ReadableImages(source, np.asarray, max_bad=0)
    for error in (MemoryError(), SyntaxError("broken\nfile"), RecursionError("deep"), ZeroDivisionError()):

        def broken(*_, error=error):
            raise error

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", broken)
        with pytest.raises(BadImageError, match=" ".join(str(error).split()) or type(error).__name__) as raised:
            images[0]
        assert "\n" not in str(raised.value)


def test_too_many_open_files_do_not_count_as_a_bad_image(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    source = folder_with(tmp_path, "rgb.png", photo(0).save)
    images = ReadableImages(source, np.asarray, max_bad=1)
    monkeypatch.setattr(images_module, "open", full, raising=False)
    with pytest.raises(OSError, match="Too many open files"):
        images[0]
    assert images.num_bad == 0


def test_a_bug_in_a_transform_is_not_a_bad_image():
    def broken(image):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ReadableImages(Photos(), broken, max_bad=100)[0]


def test_an_index_past_the_end_is_a_bug():
    source = Photos()
    assert len(list(ReadableImages(source, np.asarray, max_bad=0))) == len(source)
    with pytest.raises(IndexError):
        ReadableImages(source, np.asarray, max_bad=0)[len(source)]


def test_timm_does_not_skip_unreadable_images_silently(tmp_path, capsys):
    make_image_folder(tmp_path, n=4)
    path = tmp_path / "train" / "cat" / "x.jpg"
    path.write_bytes(b"this is no picture")
    source = timm.data.ImageDataset(str(tmp_path / "train"))
    images = ReadableImages(source, np.asarray, max_bad=1)
    for index in range(len(images)):
        images[index]
    assert images.num_bad == 1
    assert path.name in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a list of open files")
@pytest.mark.parametrize(("kind", "num_bad"), [(torchvision.datasets.ImageFolder, 11), (timm.data.ImageDataset, 7)])
def test_no_file_stays_open(tmp_path, kind, num_bad):
    """timm's reader lists fewer kinds of files."""
    (tmp_path / "class").mkdir()
    for name, (image, options, _) in READABLE.items():
        image.save(tmp_path / "class" / name, **options)
    for name, write in UNREADABLE.items():
        if name not in ("vanished.png", "refused.png"):
            write(tmp_path / "class" / name)
    images = ReadableImages(kind(str(tmp_path)), np.asarray, max_bad=0)
    errors, counts = [], []
    gc.disable()
    try:
        for _ in range(3):
            for index in range(len(images)):
                try:
                    images[index]
                except BadImageError as error:
                    errors.append(error)  # and with it the frames it came through
            counts.append(len(os.listdir("/proc/self/fd")))
    finally:
        gc.enable()
    assert len(errors) == 3 * num_bad
    assert counts[0] == counts[1] == counts[2]
