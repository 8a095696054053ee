"""Image files of every mode, and files that cannot be read as images."""

import os

import numpy as np
import torchvision
from helpers import photo
from PIL import Image
from torch.utils.data import Dataset

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
"""{file: a function that writes it}"""
