"""Make a smaller copy of an ImageNet-like folder, whose training images cost less to decode.

    script/resize_imagenet.sh SRC DST [SIDE]

Images of SRC/train with a short side above SIDE pixels (256 by default) are decoded as training does
(`images.read_rgb`), resized to that short side with PIL's bicubic filter, which is antialiased, and saved as JPEG of
quality 95 that keeps the colours at full resolution (4:4:4), without EXIF or other metadata. A file keeps its own name,
so that classes and order stay: a large `.png` becomes a JPEG with that name, which PIL tells by its content. A file
that was compressed strongly can grow, yet has fewer pixels to decode.
Byte for byte are copied: smaller images, unreadable ones (each is named when it is copied), other files, and the other
folders of SRC with all that is in them, such as val. Files that lie in SRC itself are left out.

What it changes in training: random resized crops take 8 % to 100 % of an image's area, and on the copy they come from
fewer pixels. An image of 500 x 375 becomes one of 341 x 256, its smallest crop has 84 x 84 pixels instead of 122 x 122,
and crops below 57 % of the area are enlarged to 224 x 224, instead of those below 27 %. Training images are hence
softer than before, and validation images are not: so compare accuracies only between runs on the same copy.

The same command again goes on where an interrupted one stopped, and skips the files that are there. Only whole files
get their name; until then they are in DST/.unfinished. DST/short_side.txt holds SIDE, and marks DST as such a copy.
"""

import collections
import contextlib
import errno
import fcntl
import functools
import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402
from torchvision.datasets.folder import is_image_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from pipeline.images import read_rgb  # noqa: E402
from training.parsing import Parser, count  # noqa: E402
from utils import BadImageError, cpu_count, run_command  # noqa: E402

SMALLEST_SIDE = 64
JPEG = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
LONGEST_SIDE = 65500  # of a JPEG
MARK = "short_side.txt"
UNFINISHED = ".unfinished"
NOT_COPIED = (UNFINISHED, "lost+found")
CHUNK = 16  # files a worker is given at a time


class Chunk(NamedTuple):
    """Some files of one folder, which is relative to SRC."""

    folder: Path
    names: list[str]


def main(argv: list[str] | None = None):
    parser = Parser(prog="script/resize_imagenet.sh", description="Make a smaller copy of an ImageNet-like folder.")
    parser.add_argument("src", metavar="SRC", type=Path, help="folder with train/, and others such as val/")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder of the copy: a new one, or an unfinished copy")
    parser.add_argument("side", metavar="SIDE", type=count, nargs="?", default=256, help="short side in pixels (256)")
    args = parser.parse_args(argv)
    if args.side < SMALLEST_SIDE:
        raise SystemExit(f"error: SIDE {args.side} is too small; it must be at least {SMALLEST_SIDE} pixels")
    try:
        folders = folders_of(args.src, args.dst)
        with writing_to(args.dst, args.side):
            chunks = [chunk for folder in folders for chunk in chunks_of(folder, args.src)]
            total = copy_all(chunks, functools.partial(copy_chunk, args.src, args.dst, args.side))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise SystemExit(f"error: {where}{error.strerror or error}") from None
    except KeyboardInterrupt:
        raise SystemExit("error: interrupted; the same command goes on where it stopped") from None
    print(summary(total))


def folders_of(source: Path, target: Path) -> list[Path]:
    """The folders to copy.

    Raises:
        SystemExit: there is no train among them, or the target lies in one of them.
    """
    if not (source / "train").is_dir():
        raise SystemExit(f"error: SRC {source} has no folder train")
    folders = sorted(path for path in source.iterdir() if path.is_dir() and path.name not in NOT_COPIED)
    place = target.resolve()
    for folder in (source, *folders):  # these may be links to elsewhere
        if folder.resolve() in (place, *place.parents):
            raise SystemExit(
                f"error: DST {target} is {folder}, which is to be copied, or lies in it; choose another folder"
            )
    return folders


@contextlib.contextmanager
def writing_to(target: Path, side: int) -> Iterator[None]:
    """Make the folder of the copy, keep other runs out, and remove unfinished files, those of a killed run too."""
    target.mkdir(parents=True, exist_ok=True)
    if not (target / MARK).exists() and any(target.iterdir()):
        raise SystemExit(f"error: DST {target} is neither empty nor a copy made by this script; choose another folder")
    with open(target / MARK, "a+") as mark:
        try:
            fcntl.lockf(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # others: a file system without locks
                raise SystemExit(f"error: another run is writing to DST {target}; wait for its end") from None
        mark.seek(0)
        found = mark.read().strip()
        if not found:
            mark.write(f"{side}\n")
            mark.flush()
        elif found != str(side):
            raise SystemExit(f"error: DST {target} is a copy with SIDE {found}, not {side}; choose another folder")
        shutil.rmtree(target / UNFINISHED, ignore_errors=True)
        (target / UNFINISHED).mkdir()
        try:
            yield
        finally:
            shutil.rmtree(target / UNFINISHED, ignore_errors=True)


def chunks_of(folder: Path, source: Path) -> Iterator[Chunk]:
    """All files under a folder, in order. An empty folder is a chunk without names."""

    def stop(error: OSError):
        raise error

    for path, subfolders, names in os.walk(folder, onerror=stop, followlinks=True):
        subfolders.sort()
        names.sort()
        relative = Path(path).relative_to(source)
        for start in range(0, max(len(names), 1), CHUNK):
            yield Chunk(relative, names[start : start + CHUNK])


def copy_all(
    chunks: list[Chunk], copy: Callable[[Chunk], tuple[collections.Counter, list[str]]]
) -> collections.Counter:
    """`copy` every chunk, in a process for each core; the sum of what it counted.

    Args:
        copy: chunk -> what it counted, lines to show.
    """
    total = collections.Counter()
    workers = cpu_count()
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    number = sum(len(chunk.names) for chunk in chunks)
    with tqdm(total=number, unit=" files", smoothing=0, disable=not sys.stderr.isatty()) as bar:
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            pending, left = set(), iter(chunks)
            while True:
                while len(pending) < 4 * workers and (chunk := next(left, None)):
                    pending.add(pool.submit(copy, chunk))
                if not pending:
                    return total
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for counted, lines in (future.result() for future in done):
                    total += counted
                    bar.update(counted["files"])
                    for line in lines:
                        tqdm.write(line, file=sys.stderr)
        except BrokenProcessPool:
            raise SystemExit(
                "error: a worker process was killed, as the system does where memory runs out; "
                "the same command goes on where it stopped"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
            signal.signal(signal.SIGTERM, previous)


def start_worker():
    """Leave Ctrl-C to the parent, and end when it ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # PIL's, about images that training reads as well
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def copy_chunk(source: Path, target: Path, side: int, chunk: Chunk) -> tuple[collections.Counter, list[str]]:
    """Resize or copy the files of a chunk that are not there yet.

    Returns:
        What `summary` tells, and a line for each unreadable image.
    """
    is_train = chunk.folder.parts[0] == "train"
    part = "train" if is_train else "other"
    counted, lines = collections.Counter(files=len(chunk.names)), []
    path = chunk.folder
    try:
        (target / chunk.folder).mkdir(parents=True, exist_ok=True)
        for name in chunk.names:
            path = chunk.folder / name
            before, after = os.stat(source / path).st_size, _size(target / path)
            outcome = "there"
            if after <= 0 and after != before:  # empty: a power cut can do that
                jpeg = None
                if is_train and is_image_file(name):
                    try:
                        jpeg = smaller(source / path, side)
                    except BadImageError as error:
                        lines.append(f"unreadable image {source / path}: {error}; copied as it is")
                with appearing(target / path, target / UNFINISHED) as unfinished:
                    if jpeg is None:
                        shutil.copyfile(source / path, unfinished)
                    else:
                        unfinished.write_bytes(jpeg)
                outcome, after = ("copied", before) if jpeg is None else ("resized", len(jpeg))
            counted.update({(part, outcome): 1, (part, "before"): before, (part, "after"): after})
    except OSError as error:
        raise SystemExit(
            f"error: {path} of {source} cannot be copied to {target}: {error.strerror or error}; "
            "once that is mended, the same command goes on where it stopped"
        ) from None
    counted["unreadable"] = len(lines)
    return counted, lines


def _size(path: Path) -> int:
    """In bytes; -1 where there is no file."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


def smaller(path: Path, side: int) -> bytes | None:
    """The image in a file as a JPEG with that short side; None if it is not larger, or would be too long for a JPEG.

    Raises:
        BadImageError: it cannot be read; the message is the reason, in one line.
    """
    try:
        with open(path, "rb") as file:
            image = read_rgb(file)
    except Exception as error:  # decoders raise anything
        raise BadImageError(" ".join(str(error).split()) or type(error).__name__) from None
    scale = side / min(image.size)
    width, height = (round(scale * length) for length in image.size)
    if scale >= 1 or max(width, height) > LONGEST_SIDE:
        return None
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    image.info.clear()  # PIL would save a comment
    jpeg = io.BytesIO()  # a real file that is full would make PIL raise an error without the reason
    image.save(jpeg, **JPEG)
    return jpeg.getvalue()


@contextlib.contextmanager
def appearing(path: Path, folder: Path) -> Iterator[Path]:
    """A name in `folder` for a file that is moved to `path` once it is whole, and removed if it is not."""
    unfinished = folder / uuid.uuid4().hex
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def summary(total: collections.Counter) -> str:
    return (
        f"train: {total['train', 'resized']:,} images resized, {total['train', 'copied']:,} files copied "
        f"({total['unreadable']:,} of them unreadable images), {total['train', 'there']:,} there already; "
        f"{total['train', 'before']:,} bytes before, {total['train', 'after']:,} after. "
        f"Other folders: {total['other', 'copied']:,} files copied, {total['other', 'there']:,} there already"
    )


if __name__ == "__main__":
    run_command(main)
