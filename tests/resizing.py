"""A small folder like ImageNet's, resized by pipeline/resize.py."""

from pathlib import Path

from helpers import photo
from PIL import Image

from pipeline import resize as program

SIDE = 64


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
    """All files of a folder and their content, without the script's own."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (program.MARK, ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def make_source(root: Path) -> Path:
    """Two classes, larger and smaller images, one that is cut off, and a val folder."""
    half = add(root / "train/dog/large.png", picture(150, 100)).read_bytes()[:9000]
    images = {f"train/cat/{number}.jpg": picture(96, 72 + number, number) for number in range(20)}
    images |= {"train/dog/large.JPEG": picture(100, 100), "train/dog/small.JPEG": picture(300, 40)}
    images |= {"val/cat/0.jpg": picture(200, 150)}
    others = {"train/dog/half.png": half, "train/dog/list.txt": b"not an image"}
    others |= {"test/deep/er/notes.bin": bytes(range(256)), "beside.tar": b"left out"}
    for name, content in (images | others).items():
        add(root / name, content)
    (root / "train" / "empty").mkdir()
    return root
