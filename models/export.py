"""Export trained weights to timm, safetensors, Hugging Face transformers or ONNX.

    python -m models.export runs/NAME --to timm exported/NAME

RUN is a run folder or a file of weights in any published layout. The files are compared with the model before DIR
exists.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diversity import REMEDIES
from models.exporting import FORMATS, export
from models.flag_types import KeyValues, OneLineParser, positive_float, positive_int, with_hyphens
from utils import quiet_warnings, run_command


def build_parser() -> argparse.ArgumentParser:
    """The flags; those of a model have main.py's names."""
    formats = "; ".join(f"{format.name}: {format.doc.rstrip('.')}" for format in FORMATS.values())
    parser = OneLineParser(prog="python -m models.export", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder (its checkpoint.pth), or a file of weights")
    add("folder", metavar="DIR", type=Path, help="new or empty folder for the files and their model card")
    add("--to", required=True, choices=FORMATS, help=f"format; {formats}".replace("%", "%%"))
    add("--ema", dest="use_ema", action="store_true", help="the averaged weights; default: the raw ones")
    add("--checkpoint-key", default="", metavar="KEY",
        help="which weights of a file that has several, such as teacher or student")  # fmt: skip
    images = parser.add_argument_group("to change the images", "default: as in the training, or timm's for the model")
    add = images.add_argument
    add("--input-size", type=positive_int, metavar="PIXELS",
        help="side of the square input, to which position embeddings are resampled")  # fmt: skip
    add("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="subtracted from the colours, from 0 to 1")
    add("--std", type=positive_float, nargs=3, metavar=("R", "G", "B"), help="divides the colours")
    add(
        "--interpolation", choices=("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"), help="of the resize"
    )
    add("--eval-crop-ratio", type=positive_float, metavar="RATIO", help="input size divided by the resized side")
    add("--crop-mode", choices=("center", "squash", "border"), help="squash resizes both sides, border pads")
    group = parser.add_argument_group("for a file that is no checkpoint of this program")
    add = group.add_argument
    add("--model", metavar="NAME", help="of timm, or one of the paper's")
    add("--patch-size", type=positive_int, metavar="PIXELS", help="side of a patch; default: the model's own")
    add("--model-kwargs", nargs="*", action=KeyValues, metavar="KEY=VALUE", help="further arguments of timm's model")
    add("--remedy", nargs="*", metavar="NAME", choices=REMEDIES, help="remedies that the weights were trained with")
    add("--remedy-kwargs", nargs="*", action=KeyValues, metavar="KEY=VALUE", help="settings of these remedies")
    add("--num-classes", type=int, metavar="N", help="0 leaves the classifier out; default: that of the file")
    add("--class-names", metavar="FILE", help="text file with the name of an output in each line, in their order")
    return parser


def main(argv: Sequence[str] | None = None):
    """Export what a command line names; a mistake ends in one line and a non-zero exit code."""
    words = sys.argv[1:] if argv is None else argv
    given = vars(build_parser().parse_args([with_hyphens(word) for word in words]))
    given = {name: value for name, value in given.items() if value is not None}
    run, to, folder = (given.pop(name) for name in ("run", "to", "folder"))
    chosen = {name: given.pop(name) for name in ("use_ema", "checkpoint_key")}
    chosen["classes"] = _class_names(given.pop("class_names", ""))
    quiet_warnings()
    print("\n".join(export(run, to, folder, given, **chosen)))


def _class_names(path: str) -> list[str]:
    if not path:
        return []
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"error: --class-names {path} cannot be read: {error}") from None


if __name__ == "__main__":
    run_command(main)
