"""Images of every mode, images that cannot be read, and those that replace them."""

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
GREY = RGB[..., 0]
ALPHA = RGB[..., 1]
LEVELS = np.array([[0, 128, 129, 257, 1000, 32768, 65534, 65535]], dtype=np.uint16)
LEVELS_IN_8_BITS = np.array([[0, 0, 1, 1, 4, 128, 255, 255]])


class Photos(Dataset):
    """A few images in memory; `reads` lists those that were read, in order."""

    def __init__(self):
        self.reads = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.reads.append(index)
        return photo(index), index


def three(grey):
    return np.stack([grey] * 3, axis=-1)


def save_rgba(path):
    Image.fromarray(np.dstack([RGB, ALPHA])).save(path)
    return RGB


def save_grey(path):
    Image.fromarray(GREY).save(path)
    return three(GREY)


def save_grey_with_alpha(path):
    Image.fromarray(np.dstack([GREY, ALPHA])).save(path)
    return three(GREY)


def save_one_bit(path):
    Image.fromarray(GREY > 128).save(path)
    return three((GREY > 128) * 255)


def save_palette(path, **options):
    image = Image.fromarray(RGB).quantize(16)
    image.save(path, **options)
    return np.array(image.getpalette()).reshape(-1, 3)[np.asarray(image)]


def save_palette_with_a_clear_colour(path):
    return save_palette(path, transparency=3)


def save_palette_with_alpha(path):
    return save_palette(path, transparency=bytes(range(0, 256, 16)))


def save_rgb_with_a_clear_colour(path):
    Image.fromarray(RGB).save(path, transparency=tuple(map(int, RGB[0, 0])))
    return RGB


def save_cmyk(path):
    cmyk = np.dstack([RGB, ALPHA])
    Image.fromarray(cmyk, mode="CMYK").save(path)
    inverse = 255.0 - cmyk
    return inverse[..., :3] * inverse[..., 3:] / 255


def save_animation(path):
    frames = [Image.fromarray(array).quantize(16) for array in (RGB, 255 - RGB)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return np.asarray(frames[0].convert("RGB"))


def save_animated_png(path):
    Image.fromarray(RGB).save(path, save_all=True, append_images=[Image.fromarray(255 - RGB)])
    return RGB


def save_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(RGB).save(path, exif=exif)
    return RGB


def save_pages(path):
    Image.fromarray(RGB).save(path, save_all=True, append_images=[Image.fromarray(255 - RGB)])
    return RGB


def save_8_bits_in_16(path):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    return three(GREY)


def save_16_bits(path):
    Image.fromarray(LEVELS).save(path)
    return three(LEVELS_IN_8_BITS)


def save_16_bits_big_endian(path):
    image = Image.frombytes("I;16B", LEVELS.shape[::-1], LEVELS.astype(">u2").tobytes())
    image.save(path)
    return three(LEVELS_IN_8_BITS)


def save_16_bits_in_32(path):
    Image.fromarray(LEVELS.astype(np.int32)).save(path)
    return three(LEVELS_IN_8_BITS)


READABLE = {
    "rgb.png": lambda path: Image.fromarray(RGB).save(path) or RGB,
    "rgba.png": save_rgba,
    "rgba.webp": lambda path: Image.fromarray(np.dstack([RGB, ALPHA])).save(path, lossless=True, exact=True) or RGB,
    "grey.png": save_grey,
    "grey-alpha.png": save_grey_with_alpha,
    "one-bit.png": save_one_bit,
    "palette.png": save_palette,
    "palette-clear.png": save_palette_with_a_clear_colour,
    "palette-clear.gif": save_palette_with_a_clear_colour,
    "palette-alpha.png": save_palette_with_alpha,
    "rgb-clear.png": save_rgb_with_a_clear_colour,
    "cmyk.tif": save_cmyk,
    "animation.gif": save_animation,
    "animation.png": save_animated_png,
    "rotated.png": save_rotated,
    "pages.tif": save_pages,
    "8-in-16.png": save_8_bits_in_16,
    "8-in-16.pgm": save_8_bits_in_16,
    "16.png": save_16_bits,
    "16.pgm": save_16_bits,
    "16.tif": save_16_bits,
    "16-big-endian.tif": save_16_bits_big_endian,
    "32.tif": save_16_bits_in_32,
}


def folder_with(root, name, write):
    """A torchvision folder of one class; `write` makes its only image."""
    (root / "class").mkdir()
    path = root / "class" / name
    path.write_bytes(b"")
    source = torchvision.datasets.ImageFolder(root, is_valid_file=os.path.isfile)
    return source, write(path)


@pytest.mark.parametrize("name", READABLE)
def test_every_mode_becomes_rgb(tmp_path, name):
    source, expected = folder_with(tmp_path, name, READABLE[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_warnings()
        image, label = ReadableImages(source, np.asarray, max_bad=0)[0]
    assert label == 0
    assert (image.dtype, image.shape) == (np.uint8, expected.shape)
    assert np.abs(image - expected.astype(float)).max() <= (1 if name == "cmyk.tif" else 0)


@pytest.mark.parametrize("name", ["rgb.png", "palette.png", "rotated.jpg", "cmyk.jpg", "grey.jpg", "rgba.png"])
def test_common_images_are_read_as_torchvision_and_timm_do(tmp_path, name):
    """A JPEG too: what DeiT trained on."""
    save = {"rotated.jpg": save_rotated, "grey.jpg": save_grey}.get(name) or READABLE.get(name)
    save = save or (lambda path: Image.fromarray(np.dstack([RGB, ALPHA]), mode="CMYK").save(path))
    source, _ = folder_with(tmp_path, name, save)
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
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def wrong_checksum(path):
    photo(0).save(path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"IDAT") + 50] ^= 255
    path.write_bytes(whole)


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
    "half-16.png": lambda path: half(path, Image.fromarray(GREY.astype(np.uint16) * 257)),
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
    source, _ = folder_with(tmp_path, name, UNREADABLE[name])
    images = ReadableImages(source, np.asarray, max_bad=0)
    for _ in range(2):  # it does not count as replaced the second time
        with pytest.raises(BadImageError, match=rf"^unreadable image .*{name}: .+ \(number 1; 0 may be replaced\)$"):
            images[0]
    assert images.num_bad == 0


def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch):
    """It has more than twice PIL's limit of pixels."""
    source, _ = folder_with(tmp_path, "bomb.png", photo(0).save)
    images = ReadableImages(source, np.asarray, max_bad=0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    assert np.array_equal(images[0][0], np.asarray(photo(0)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 799)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", pytest.fail)
    with pytest.raises(BadImageError, match="decompression bomb"):
        images[0]


def test_any_error_of_a_decoder_is_a_bad_image(tmp_path, monkeypatch):
    source, _ = folder_with(tmp_path, "rgb.png", photo(0).save)
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

    source, _ = folder_with(tmp_path, "rgb.png", photo(0).save)
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
    for name, write in (UNREADABLE | READABLE).items():
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
