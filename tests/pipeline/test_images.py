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
from data_files import write_inat
from helpers import make_image_folder, photo
from image_files import JPEG, LEVELS, LEVELS_IN_8_BITS, READABLE, UNREADABLE, Photos, folder_with, three
from PIL import Image
from torch.utils.data import Dataset

from pipeline import images as images_module
from pipeline.image_folder import ImageFolder
from pipeline.images import ReadableImages, image_name
from pipeline.inaturalist import INaturalist
from utils import BadImageError, quiet_warnings

# Modes


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


def test_names_of_images(tmp_path):
    """As a user finds them, and for a checkpoint without the folder, which may be another one later."""
    make_image_folder(tmp_path)
    write_inat(tmp_path, 2018, flattened=False)
    train = tmp_path / "train"
    first = "train_val2018/Mammalia/10/train3.jpg"
    sources = {
        ImageFolder(train): (f"{train}/cat/0.png", "cat/0.png"),
        timm.data.ImageDataset(str(train)): ("cat/0.png", "cat/0.png"),
        INaturalist(tmp_path, "train", 2018, "name"): (f"{tmp_path}/{first}", first),
        Photos(): ("number 0", "number 0"),
    }
    for source, names in sources.items():
        assert (image_name(source, 0), image_name(source, 0, relative=True)) == names


# Images that cannot be read


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
        with pytest.raises(
            BadImageError,
            match=rf"^unreadable image .*{name}: .+ \(number 1; 0 may be replaced\); --check-data lists all of them$",
        ):
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
