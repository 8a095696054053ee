"""Make a smaller copy of an ImageNet-like folder, whose training images cost less to decode.

    script/resize_imagenet.sh SRC DST [SIDE]

- Images of SRC/train with a short side above SIDE pixels (256 by default) are decoded as training does and resized to
  that short side with PIL's bicubic filter, which is antialiased. They are saved as JPEG of quality 95 with colours at
  full resolution (4:4:4), without EXIF or other metadata. All names stay, and so do the classes and their order.
- All other files in the folders of SRC, such as val, are copied without a change. So are images that cannot be read or
  resized; each of them is reported. Files directly in SRC are left out.
- A file has its name only when it is complete. The same command continues an interrupted copy, and skips the files that
  exist. DST/short_side.txt contains SIDE, and marks DST as such a copy.

What changes in training: random resized crops cover 8 % to 100 % of an image's area, and on the copy they come from
fewer pixels. An image of 500 x 375 becomes one of 341 x 256, its smallest crop has 84 x 84 pixels instead of 122 x 122,
and crops below 57 % of the area are enlarged to 224 x 224, instead of those below 27 %. So training images are softer
than before, and validation images are not: compare accuracies only between runs on the same copy.
"""

import argparse
import collections
import functools
import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import is_image_file
from tqdm import tqdm

from pipeline.image_folder import is_hidden
from pipeline.images import read_rgb
from utils import atomic_write, cpu_count, lock_folder, run_command

SMALLEST_SIDE = 64
JPEG = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
MARK = "short_side.txt"


def main(argv: list[str] | None = None):
    """Resize and copy with one process for each core."""
    parser = argparse.ArgumentParser(prog="script/resize_imagenet.sh", description=__doc__.splitlines()[0])
    parser.add_argument("src", metavar="SRC", type=Path, help="folder with train/, and others such as val/")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder of the copy: a new one, or an unfinished copy")
    parser.add_argument("side", metavar="SIDE", type=int, nargs="?", default=256, help="short side in pixels (256)")
    args = parser.parse_args(argv)
    source, target, side = args.src, args.dst, args.side
    counts = collections.Counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    pool = ProcessPoolExecutor(cpu_count(), initializer=start_worker)
    try:
        check_folders(source, target, side)
        target.mkdir(parents=True, exist_ok=True)
        (target / MARK).write_text(f"{side}\n")
        with lock_folder(target, "DST"):
            names = list(make_folders(source, target))
            results = pool.map(functools.partial(copy, source, target, side), names, chunksize=16)
            for outcome, problem in tqdm(results, total=len(names), unit=" files", disable=not sys.stderr.isatty()):
                counts[outcome] += 1
                if problem:
                    tqdm.write(problem, file=sys.stderr)
    except (BrokenProcessPool, KeyboardInterrupt, OSError) as error:
        killed = "a worker was killed, as the system does when memory runs out"
        reason = {BrokenProcessPool: killed, KeyboardInterrupt: "interrupted"}.get(type(error), error)
        raise SystemExit(f"error: {reason}; the same command continues from here") from None
    finally:
        pool.shutdown(cancel_futures=True)
    print(
        f"{counts['resized']:,} images resized, {counts['copied']:,} files copied, {counts['unreadable']:,} unreadable "
        f"images copied, {counts['skipped']:,} files skipped"
    )


def check_folders(source: Path, target: Path, side: int):
    """Raise SystemExit if SRC has no train folder, SIDE is small, or DST has other content or is in a copied folder."""
    if side < SMALLEST_SIDE:
        raise SystemExit(f"error: SIDE {side} is too small; it must be at least {SMALLEST_SIDE} pixels")
    if not (source / "train").is_dir():
        raise SystemExit(f"error: SRC {source} has no folder train")
    for folder in (source, *filter(Path.is_dir, source.iterdir())):  # these may be links
        if target.resolve().is_relative_to(folder.resolve()):
            raise SystemExit(f"error: DST {target} is in {folder}, which is to be copied; choose another folder")
    found = (target / MARK).read_text().strip() if (target / MARK).exists() else None
    if found not in (None, str(side)):
        raise SystemExit(f"error: DST {target} is a copy with SIDE {found}, not {side}; choose another folder")
    if found is None and target.exists() and any(target.iterdir()):
        raise SystemExit(f"error: DST {target} is neither empty nor a copy made by this script; choose another folder")


def make_folders(source: Path, target: Path) -> Iterator[str]:
    """Make the folders of the copy, and yield the names of all files in them, relative to `source`."""

    def stop(error: OSError):
        raise error

    for path, folders, files in os.walk(source, onerror=stop, followlinks=True):
        folders.sort()
        relative = Path(path).relative_to(source)
        (target / relative).mkdir(exist_ok=True)
        if relative.parts:
            yield from (str(relative / name) for name in sorted(files))


def start_worker():
    """Leave Ctrl-C to the parent, and end when the parent ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # PIL's, about images that training reads as well
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()


def copy(source: Path, target: Path, side: int, name: str) -> tuple[str, str]:
    """Resize or copy a file that does not exist yet; returns what was done, and a line about an unreadable image."""
    if (target / name).exists():
        return "skipped", ""
    outcome, problem, jpeg = "copied", "", None
    if name.startswith("train/") and is_image_file(name) and not is_hidden(name):
        try:
            jpeg = smaller(source / name, side)
            outcome = "resized" if jpeg else "copied"
        except Exception as error:  # decoders raise many types
            reason = " ".join(str(error).split()) or type(error).__name__
            outcome, problem = "unreadable", f"unreadable image {source / name}: {reason}; copied as it is"
    try:
        with atomic_write(target / name) as file, io.BytesIO(jpeg) if jpeg else open(source / name, "rb") as content:
            shutil.copyfileobj(content, file)
    except OSError as error:
        raise OSError(f"{source / name} cannot be copied to {target}: {error}") from None
    return outcome, problem


def smaller(path: Path, side: int) -> bytes | None:
    """The image in a file as a JPEG with that short side; None if its short side is not larger."""
    with open(path, "rb") as file:
        image = read_rgb(file)
    scale = side / min(image.size)
    if scale >= 1:
        return None
    image = image.resize([round(scale * length) for length in image.size], Image.Resampling.BICUBIC)
    image.info.clear()  # PIL would save a comment
    jpeg = io.BytesIO()
    image.save(jpeg, **JPEG)
    return jpeg.getvalue()


if __name__ == "__main__":
    run_command(main)
