"""script/resize_imagenet.sh: what is resized and what is copied, and errors in one line."""

import io
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY, data_options, one_line, parse
from PIL import Image, JpegImagePlugin
from resizing import SIDE, add, files_of, picture, resize

from pipeline import resize as program
from pipeline.images import ReadableImages, read_rgb
from pipeline.opening import build_source
from utils import lock_folder

SUMMARY = "22 images resized, 4 files copied, 1 unreadable images copied, 0 files skipped\n"


def resized(path: Path) -> Image.Image | None:
    jpeg = program.smaller(path, SIDE)
    return jpeg and Image.open(io.BytesIO(jpeg))


SIZES = {(128, 96): (85, 64), (96, 128): (64, 85), (65, 65): (64, 64), (1000, 70): (914, 64)}


@pytest.mark.parametrize("size", [*SIZES, (64, 64), (64, 500), (500, 63), (1, 1)])
def test_the_short_side_decides(tmp_path, size):
    image = resized(add(tmp_path / "1.png", picture(*size)))
    assert (image and image.size) == SIZES.get(size)


def test_pixels_are_averages_of_those_they_replace(tmp_path):
    """Fine stripes become even grey, as they do not without antialiasing, and sharp colours keep their edges."""
    stripes, halves = np.zeros((2, 256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    halves[:, :132], halves[:, 132:] = (255, 0, 0), (0, 0, 255)
    grey, image = (resized(add(tmp_path / "1.png", Image.fromarray(array))) for array in (stripes, halves))
    assert np.abs(np.asarray(grey)[:, 2:-2].astype(int) - 100).max() <= 4
    assert JpegImagePlugin.get_sampling(image) == 0
    found = np.asarray(image).astype(int)
    assert np.abs(found[:, :31] - (255, 0, 0)).max() <= 30
    assert np.abs(found[:, 35:] - (0, 0, 255)).max() <= 30


RGB, OTHER = picture(130, 100), picture(130, 100, 1).convert("L")
ALPHA = Image.merge("RGBA", [*RGB.split(), OTHER])
CMYK = Image.merge("CMYK", [*RGB.split(), OTHER])
GREY_16 = Image.fromarray(np.asarray(RGB.convert("L")).astype(np.uint16) * 257)
ROTATION = Image.Exif()
ROTATION[0x0112] = 6  # "turn me by 90 degrees"
METADATA = {"exif": ROTATION, "xmp": b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'}
METADATA |= {"icc_profile": b"profile", "comment": b"comment", "quality": 95}
FILES = {"alpha.webp": (ALPHA, {}), "16.png": (GREY_16, {}), "palette.png": (RGB.quantize(16), {"transparency": 3})}
FILES |= {"alpha.png": (ALPHA, {}), "cmyk.jpg": (CMYK, {}), "grey.jpeg": (RGB.convert("L"), {})}
FILES |= {"rgb.bmp": (RGB, {}), "rgb.tiff": (RGB, {}), "rotated.jpg": (RGB, METADATA), "rotated.png": (RGB, METADATA)}


@pytest.mark.parametrize("name", FILES)
def test_every_mode_is_what_training_reads(tmp_path, name):
    image, options = FILES[name]
    path = add(tmp_path / name, image, **options)
    expected = read_rgb(open(path, "rb")).resize((83, 64), Image.Resampling.BICUBIC)  # noqa: SIM115
    found = resized(path)
    assert (found.format, found.mode, found.size) == ("JPEG", "RGB", (83, 64))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 4  # of noise, through a JPEG
    assert not dict(found.getexif())
    assert {key for key in found.info if not key.startswith("jfif")} == set()


def test_all_else_is_copied_byte_for_byte(source, tmp_path, capsys):
    add(source / "train" / "dog" / "long.png", Image.new("RGB", (66700, 65)))  # too long for a JPEG
    resize(source, tmp_path / "copy", SIDE)
    before, after = files_of(source), files_of(tmp_path / "copy")
    assert after.keys() == before.keys() - {"beside.tar"}
    same = {name for name in after if after[name] == before[name]}
    copied = {f"train/dog/{name}" for name in ("small.JPEG", "half.png", "long.png", "list.txt")}
    assert same == {"val/cat/0.jpg", "test/deep/er/notes.bin", *copied}
    assert (tmp_path / "copy" / "train" / "empty").is_dir()
    assert sorted(os.listdir(tmp_path / "copy")) == [".lock", "short_side.txt", "test", "train", "val"]
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "copy").rglob("*.*")} == {0o666 & ~mask}
    captured = capsys.readouterr()
    assert captured.out == SUMMARY.replace("1 unreadable", "2 unreadable")
    reported = captured.err.splitlines()
    for line, name in zip(sorted(reported), ("half", "long"), strict=True):
        assert re.fullmatch(rf"unreadable image {source}/train/dog/{name}\.png: .+; copied as it is", line)


def test_a_copy_is_a_training_source(source, tmp_path):
    (source / "train" / "empty").rmdir()
    resize(source, tmp_path / "copy", SIDE)
    read = []
    for root in (source, tmp_path / "copy"):
        folder = build_source(data_options("--data-set", "IMNET", "--data-path", root), is_training=True)
        images = ReadableImages(folder, lambda image: image, max_bad=1)
        read.append([images[index] for index in range(len(images))])
        assert [folder.samples[bad][0] for bad in images.is_bad.nonzero()] == [str(root / "train/dog/half.png")]
    assert len(read[0]) == 24
    for (original, label), (image, copied_label) in zip(*read, strict=True):
        assert copied_label == label
        assert min(image.size) == min(SIDE, *original.size)
        assert image.width / image.height == pytest.approx(original.width / original.height, rel=0.01)


@pytest.mark.parametrize("name", ["val", "val/cat"])
def test_folders_that_are_links_are_followed(source, tmp_path, name):
    shutil.move(source / name, tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    resize(source, tmp_path / "copy", SIDE)
    assert files_of(tmp_path / "copy" / name) == files_of(tmp_path / "elsewhere") != {}
    assert not (tmp_path / "copy" / name).is_symlink()


def refusal(*words) -> str:
    with pytest.raises(SystemExit) as caught:
        resize(*words)
    return one_line(caught)


def test_a_copy_inside_its_source(source, tmp_path):
    (tmp_path / "linked").symlink_to(source)
    (tmp_path / "elsewhere").mkdir()
    (source / "more").symlink_to(tmp_path / "elsewhere")
    before = files_of(source)
    for place in (".", "copy", "train", "train/cat", "../linked/copy", "../elsewhere/copy"):
        assert f"DST {source / place} is in " in refusal(source, source / place, SIDE)
    assert files_of(source) == before


def test_folders_and_files_that_are_refused(source, tmp_path):
    for folder in (source / "val", tmp_path / "nothing"):
        assert f"{folder} has no folder train" in refusal(folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert "neither empty" in refusal(source, add(tmp_path / "other/0.jpg", b"another").parent, SIDE)
    assert str(source / "beside.tar") in refusal(source, source / "beside.tar", SIDE)
    copy = tmp_path / "copy"
    resize(source, copy, SIDE)
    before = files_of(copy)
    assert f"DST {copy} is a copy with SIDE 64, not 65" in refusal(source, copy, SIDE + 1)
    with lock_folder(copy, "DST"):
        assert f"DST {copy} is in use by process {os.getpid()}" in refusal(source, copy, SIDE)
    assert files_of(copy) == before
    (source / "train" / "gone.jpg").symlink_to("nowhere")
    assert re.search(f"{source}/train/gone.jpg .*No such file", refusal(source, copy, SIDE))


@pytest.mark.parametrize("side", ["63", "0", "-256", "256.5", "wide", ""])
def test_a_bad_side(source, tmp_path, capsys, side):
    with pytest.raises(SystemExit) as caught:
        resize(source, tmp_path / "copy", side)
    message = capsys.readouterr().err or f"{caught.value}\n"
    assert re.fullmatch(r"[^\n]*error: [^\n]*SIDE[^\n]*", message.splitlines()[-1])
    assert not (tmp_path / "copy").exists()


def test_the_shell_script(source, tmp_path):
    script = REPOSITORY / "script" / "resize_imagenet.sh"

    def run(*words):
        return subprocess.run(["bash", script, *words], cwd=tmp_path, capture_output=True, text=True, timeout=240)

    for words in ((), ("source",), ("source", "copy", "64", "more")):
        result = run(*words)
        assert (result.returncode, result.stderr) == (2, f"usage: {script} SRC DST [SIDE]\n")
    result = run("source", "copy", str(SIDE))
    assert (result.returncode, result.stdout) == (0, SUMMARY), result.stderr
    assert re.fullmatch(r"unreadable image source/train/dog/half\.png: .*; copied as it is\n", result.stderr)


def test_the_default_side_and_the_numbers_of_the_docstring(tmp_path, two_workers):
    text = " ".join(program.__doc__.split())
    original = (500, 375)
    add(tmp_path / "source" / "train" / "cat" / "1.jpg", picture(*original))
    resize(tmp_path / "source", tmp_path / "copy")
    smaller = Image.open(tmp_path / "copy" / "train" / "cat" / "1.jpg").size
    assert smaller == (341, 256)
    assert "An image of {} x {} becomes one of {} x {},".format(*original, *smaller) in text
    crops = [round(math.sqrt(0.08 * math.prod(size))) for size in (smaller, original)]
    assert f"has {crops[0]} x {crops[0]} pixels instead of {crops[1]} x {crops[1]}" in text
    shares = [math.floor(100 * 224**2 / math.prod(size) + 0.5) for size in (smaller, original)]
    assert f"below {shares[0]} % of the area are enlarged to 224 x 224, instead of those below {shares[1]} %" in text
    assert f"quality {program.JPEG['quality']}" in text
    assert parse().scale == [0.08, 1]
