"""script/resize_imagenet.sh: what is resized and what is copied, restarts, kills, and errors in one line."""

import functools
import io
import math
import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import forking
import numpy as np
import pytest
from helpers import REPOSITORY, data_options, one_line, parse, photo
from PIL import Image, JpegImagePlugin

from pipeline import resize as program
from pipeline.images import ReadableImages, read_rgb
from pipeline.sources import build_source
from utils import lock_folder

SIDE = 64


@pytest.fixture(autouse=True)
def workers(monkeypatch):
    """Two processes, forked, so that what a test replaces is replaced in them too."""
    monkeypatch.setattr(program, "cpu_count", lambda: 2)
    pool = functools.partial(ProcessPoolExecutor, mp_context=forking.FORK)
    monkeypatch.setattr(program, "ProcessPoolExecutor", pool)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def resize(*words):
    program.main([str(word) for word in words])


def picture(width, height, seed=0) -> Image.Image:
    return photo(seed).resize((width, height), Image.Resampling.BICUBIC)


def add(path: Path, content: Image.Image | bytes, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path, **options)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder and what is in them, without the script's own."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (program.MARK, ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def source(tmp_path) -> Path:
    """Two classes, larger and smaller images, one that is cut off, and a val folder."""
    root = tmp_path / "source"
    for number in range(20):
        add(root / "train" / "cat" / f"{number}.jpg", picture(96, 72 + number, number))
    add(root / "train" / "dog" / "large.JPEG", picture(150, 100))
    add(root / "train" / "dog" / "small.JPEG", picture(300, 40))
    complete = add(root / "train" / "dog" / "complete.png", picture(100, 100)).read_bytes()
    add(root / "train" / "dog" / "half.png", complete[: len(complete) // 2])
    add(root / "train" / "dog" / "list.txt", b"not an image")
    (root / "train" / "empty").mkdir()
    add(root / "val" / "cat" / "0.jpg", picture(200, 150))
    add(root / "test" / "deep" / "er" / "notes.bin", bytes(range(256)))
    add(root / "beside.tar", b"left out")
    return root


# What is resized and what is copied


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((128, 96), (85, 64)),
        ((96, 128), (64, 85)),
        ((65, 65), (64, 64)),
        ((1000, 70), (914, 64)),
        ((64, 64), None),
        ((64, 500), None),
        ((500, 63), None),
        ((1, 1), None),
    ],
)
def test_the_short_side_decides(tmp_path, size, expected):
    jpeg = program.smaller(add(tmp_path / "1.png", picture(*size)), SIDE)
    assert (jpeg and Image.open(io.BytesIO(jpeg)).size) == expected


def test_256_is_the_default_side(tmp_path):
    add(tmp_path / "source" / "train" / "cat" / "1.jpg", picture(500, 375))
    resize(tmp_path / "source", tmp_path / "copy")
    assert Image.open(tmp_path / "copy" / "train" / "cat" / "1.jpg").size == (341, 256)


def test_an_image_that_is_too_long_for_a_jpeg_is_copied(tmp_path, capsys):
    original = add(tmp_path / "source" / "train" / "cat" / "1.png", Image.new("RGB", (66700, 65)))
    resize(tmp_path / "source", tmp_path / "copy", SIDE)
    assert (tmp_path / "copy" / "train" / "cat" / "1.png").read_bytes() == original.read_bytes()
    assert "copied as it is" in capsys.readouterr().err


def test_pixels_are_averages_of_those_they_replace(tmp_path):
    """Fine stripes become even grey, as they do not without antialiasing, and sharp colours keep their edges."""
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    halves = np.zeros((256, 256, 3), dtype=np.uint8)
    halves[:, :132] = (255, 0, 0)
    halves[:, 132:] = (0, 0, 255)
    grey, image = (
        Image.open(io.BytesIO(program.smaller(add(tmp_path / "1.png", Image.fromarray(array)), SIDE)))
        for array in (stripes, halves)
    )
    assert np.abs(np.asarray(grey)[:, 2:-2].astype(int) - 100).max() <= 4
    assert JpegImagePlugin.get_sampling(image) == 0
    found = np.asarray(image).astype(int)
    assert np.abs(found[:, :31] - (255, 0, 0)).max() <= 30
    assert np.abs(found[:, 35:] - (0, 0, 255)).max() <= 30


def palette(path):
    picture(130, 100).quantize(16).save(path, transparency=3)


def cmyk(path):
    array = np.dstack([np.asarray(picture(130, 100)), np.asarray(picture(130, 100, 1))[..., 0]])
    Image.fromarray(array, mode="CMYK").save(path)


def grey_of_16_bits(path):
    Image.fromarray(np.asarray(picture(130, 100).convert("L")).astype(np.uint16) * 257).save(path)


def with_alpha(path):
    image = picture(130, 100)
    image.putalpha(picture(130, 100, 1).convert("L"))
    image.save(path)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    picture(130, 100).save(path, exif=exif, xmp=xmp, icc_profile=b"profile", comment=b"comment", quality=95)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("palette.png", palette),
        ("cmyk.jpg", cmyk),
        ("16.png", grey_of_16_bits),
        ("alpha.webp", with_alpha),
        ("alpha.png", with_alpha),
        ("rotated.jpg", rotated),
        ("rotated.png", rotated),
        ("grey.jpeg", lambda path: picture(130, 100).convert("L").save(path)),
        ("rgb.bmp", lambda path: picture(130, 100).save(path)),
        ("rgb.tiff", lambda path: picture(130, 100).save(path)),
    ],
)
def test_every_mode_is_what_training_reads(tmp_path, name, save):
    path = tmp_path / name
    save(path)
    with open(path, "rb") as file:
        expected = read_rgb(file).resize((83, 64), Image.Resampling.BICUBIC)
    jpeg = program.smaller(path, SIDE)
    found = read_rgb(io.BytesIO(jpeg))
    assert found.size == (83, 64)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 4  # of noise, through a JPEG
    image = Image.open(io.BytesIO(jpeg))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert not dict(image.getexif())
    assert {key for key in image.info if not key.startswith("jfif")} == set()


def test_all_else_is_copied_byte_for_byte(source, tmp_path, capsys):
    resize(source, tmp_path / "copy", SIDE)
    before, after = files_of(source), files_of(tmp_path / "copy")
    assert after.keys() == before.keys() - {"beside.tar"}
    same = {name for name in after if after[name] == before[name]}
    copied = {"small.JPEG", "half.png", "list.txt"}
    assert same == {"val/cat/0.jpg", "test/deep/er/notes.bin", *(f"train/dog/{name}" for name in copied)}
    assert (tmp_path / "copy" / "train" / "empty").is_dir()
    assert sorted(os.listdir(tmp_path / "copy")) == [".lock", "short_side.txt", "test", "train", "val"]
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "copy").rglob("*.*")} == {0o666 & ~mask}
    captured = capsys.readouterr()
    assert captured.out == "22 images resized, 4 files copied, 1 unreadable images copied, 0 files skipped\n"
    unreadable = captured.err.splitlines()
    assert len(unreadable) == 1
    assert unreadable[0].startswith(f"unreadable image {source / 'train' / 'dog' / 'half.png'}: ")


def test_a_copy_is_a_training_source(source, tmp_path, capsys):
    (source / "train" / "empty").rmdir()
    resize(source, tmp_path / "copy", SIDE)
    read = {}
    for root in (source, tmp_path / "copy"):
        folder = build_source(data_options("--data-set", "IMNET", "--data-path", root), is_training=True)
        images = ReadableImages(folder, lambda image: image, max_bad=1)
        read[root.name] = [images[index] for index in range(len(images))]
        assert [folder.samples[index][0] for index in images.is_bad.nonzero().flatten().tolist()] == [
            str(root / "train/dog/half.png")
        ]
    assert len(read["copy"]) == 24
    for (original, label), (image, copied_label) in zip(read["source"], read["copy"], strict=True):
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


# Restarts


def test_a_second_run_skips_what_exists(source, tmp_path, capsys):
    copy = tmp_path / "copy"
    resize(source, copy, SIDE)
    first = files_of(copy)
    (copy / "train" / "cat" / "3.jpg").unlink()
    add(copy / "train" / "cat" / "3.jpg.tmp", b"by a killed run")
    inodes = {name: (copy / name).stat().st_ino for name in files_of(copy) if not name.endswith(".tmp")}
    capsys.readouterr()
    resize(source, copy, SIDE)
    assert files_of(copy) == first
    assert all((copy / name).stat().st_ino == inode for name, inode in inodes.items())
    assert capsys.readouterr().out == "1 images resized, 0 files copied, 0 unreadable images copied, 26 files skipped\n"


def at_call(number, do):
    """Replaces os.replace, which the workers call for each file: `do()` before one call of them."""
    calls, replace = forking.FORK.Value("i", 0), os.replace

    def replacement(*names):
        with calls.get_lock():
            calls.value += 1
            is_due = calls.value == number
        if is_due:
            do()
        replace(*names)

    return replacement


@pytest.mark.parametrize("number", [1, 18])
def test_a_kill_leaves_complete_files_and_no_process(source, tmp_path, monkeypatch, number):
    copy, reference = tmp_path / "copy", tmp_path / "reference"
    resize(source, reference, SIDE)
    reader, writer = os.pipe()  # ends when all processes have ended

    def kill():
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # until it notices

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", at_call(number, kill))
        process = forking.FORK.Process(target=resize, args=(source, copy, SIDE))
        process.start()
    os.close(writer)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert os.read(reader, 1) == b""
    os.close(reader)
    left, expected = files_of(copy), files_of(reference)
    finished = {name for name in left if not name.endswith(".tmp")}
    assert finished < left.keys() and finished < expected.keys()  # else it was killed at another moment
    assert all(left[name] == expected[name] for name in finished)
    resize(source, copy, SIDE)
    assert files_of(copy) == expected


def resize_and_report(pipe, *words):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
    try:
        resize(*words)
    except SystemExit as stop:
        pipe.send(stop.code)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_in_one_line_and_continues(source, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", at_call(5, lambda: os.kill(os.getppid(), number)))
        process, pipe = forking.start(resize_and_report, source, tmp_path / "copy", SIDE)
    assert forking.receive(pipe) == "error: interrupted; the same command continues from here"
    assert forking.exit_code(process) == 0
    resize(source, tmp_path / "copy", SIDE)
    assert len(files_of(tmp_path / "copy")) == 27


# Errors


def test_a_disk_that_is_full(source, tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", at_call(4, full))
        with pytest.raises(SystemExit) as caught:
            resize(source, tmp_path / "copy", SIDE)
    assert re.search(r"train/cat/\d+\.jpg", one_line(caught, tmp_path / "copy", "No space left on device"))
    resize(source, tmp_path / "copy", SIDE)
    assert len(files_of(tmp_path / "copy")) == 27


def test_a_worker_that_is_killed(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", at_call(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        with pytest.raises(SystemExit) as caught:
            resize(source, tmp_path / "copy", SIDE)
    one_line(caught, "killed", "memory")
    resize(source, tmp_path / "copy", SIDE)
    assert len(files_of(tmp_path / "copy")) == 27


def test_a_file_that_cannot_be_copied(source, tmp_path):
    (source / "train" / "dog" / "gone.jpg").symlink_to("nowhere")
    with pytest.raises(SystemExit) as caught:
        resize(source, tmp_path / "copy", SIDE)
    one_line(caught, "train/dog/gone.jpg", source, "No such file")


def test_a_source_without_train(tmp_path):
    add(tmp_path / "source" / "val" / "cat" / "1.jpg", picture(10, 10))
    for source in (tmp_path / "source", tmp_path / "nothing"):
        with pytest.raises(SystemExit) as caught:
            resize(source, tmp_path / "copy")
        one_line(caught, source, "no folder train")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("place", [".", "copy", "train", "train/cat", "../linked/copy", "../elsewhere/copy"])
def test_a_copy_inside_its_source(source, tmp_path, place):
    (tmp_path / "linked").symlink_to(source)
    (tmp_path / "elsewhere").mkdir()
    (source / "more").symlink_to(tmp_path / "elsewhere")
    before = files_of(source)
    with pytest.raises(SystemExit) as caught:
        resize(source, source / place, SIDE)
    one_line(caught, source / place)
    assert files_of(source) == before


def test_a_folder_with_something_else_in_it(source, tmp_path):
    add(tmp_path / "copy" / "train" / "cat" / "0.jpg", b"another")
    with pytest.raises(SystemExit) as caught:
        resize(source, tmp_path / "copy", SIDE)
    one_line(caught, tmp_path / "copy", "neither empty")
    with pytest.raises(SystemExit) as caught:
        resize(source, source / "beside.tar", SIDE)
    one_line(caught, source / "beside.tar")


def test_a_copy_with_another_side(source, tmp_path):
    resize(source, tmp_path / "copy", SIDE)
    before = files_of(tmp_path / "copy")
    with pytest.raises(SystemExit) as caught:
        resize(source, tmp_path / "copy", SIDE + 1)
    one_line(caught, tmp_path / "copy", SIDE, SIDE + 1)
    assert files_of(tmp_path / "copy") == before


def test_two_runs_at_once(source, tmp_path):
    resize(source, tmp_path / "copy", SIDE)
    before = files_of(tmp_path / "copy")
    with lock_folder(tmp_path / "copy", "DST"), pytest.raises(SystemExit) as caught:
        resize(source, tmp_path / "copy", SIDE)
    one_line(caught, f"DST {tmp_path / 'copy'} is in use by process {os.getpid()}")
    assert files_of(tmp_path / "copy") == before


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
    assert result.returncode == 0, result.stderr
    assert result.stdout == "22 images resized, 4 files copied, 1 unreadable images copied, 0 files skipped\n"
    assert re.fullmatch(r"unreadable image source/train/dog/half\.png: .*; copied as it is\n", result.stderr)


def test_the_numbers_of_the_docstring(tmp_path):
    text = " ".join(program.__doc__.split())
    width, height = 500, 375
    original = add(tmp_path / "1.png", picture(width, height))
    smaller = Image.open(io.BytesIO(program.smaller(original, 256))).size
    assert f"{width} x {height} becomes one of {smaller[0]} x {smaller[1]}" in text
    crops = [round(math.sqrt(0.08 * area)) for area in (math.prod(smaller), width * height)]
    assert f"has {crops[0]} x {crops[0]} pixels instead of {crops[1]} x {crops[1]}" in text
    shares = [math.floor(100 * 224**2 / area + 0.5) for area in (math.prod(smaller), width * height)]
    assert f"below {shares[0]} % of the area are enlarged to 224 x 224, instead of those below {shares[1]} %" in text
    assert f"quality {program.JPEG['quality']}" in text
    assert parse().scale == [0.08, 1]
