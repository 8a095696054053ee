"""Redundancy of any checkpoint at the three levels: JSON, Markdown and figures.

    python analyze.py runs/study/plain/seed{0,1} runs/study/all/seed{0,1} --output-dir runs/analysis

A RUN is a run folder, a checkpoint file, the name of a timm model (with its published weights, or those of --finetune),
or the word random for the initial weights of --model, the natural baseline. Runs that differ only in their seed (by
their paths, or by --names) are one configuration: its mean is drawn, and the table gives the differences between
configurations. Further flags are main.py's (--data-path, --model, --config ...); a run folder and this program's
checkpoints bring their own. `--atlas` measures models of any architectures, each beside its initial weights:

    python analyze.py --atlas --data-path /path/to/imagenet --output-dir atlas
"""

import argparse
import itertools
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback of an import; see `run_command`

from diversity import MEASURES, TapError
from diversity.function_level import FUNCTION_MEASURES
from models.flag_types import with_hyphens
from pipeline.workers import loader_errors
from reports.atlas import make_atlas
from reports.function_level import PROBE_IMAGES, TEST_IMAGES, function_options
from reports.redundancy import analyze
from training.parsing import Parser, device_name, flag_of, nonneg_int
from utils import joined_world, one_line_errors, quiet_warnings, run_command

NOT_OF_AN_ATLAS = (
    *("names", "layer", "image", "function_level", "function_images", "probe_images", "function_measures"),
)
"""Arguments of `analyze` that --atlas does not have."""


def _block(text: str) -> str:
    if text not in ("first", "last") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"is first, last or the index of a block; got {text!r}")
    return text


def parse(argv: list[str]) -> tuple[dict, list[str]]:
    """The settings of a command line, with the names of `analyze`'s arguments, and words that are flags of main.py."""
    parser = build_parser()
    words = [with_hyphens(word) for word in argv]
    options, rest = parser.parse_known_args(words)
    options.runs = [*itertools.takewhile(lambda word: not word.startswith("-"), rest)]
    settings, flags = vars(options), rest[len(options.runs) :]
    if {"-h", "--help"} & {*flags}:
        _with_runs(parser).print_help()
        parser.exit()
    _check(parser, options)
    settings["function_level"] = function_options(
        settings.pop("function_level"),
        settings.pop("function_images"),
        settings.pop("probe_images"),
        settings.pop("function_measures"),
    )
    return settings, flags


def build_parser() -> Parser:
    """The flags that are not main.py's. RUN is not among them, as argparse would take the value of main.py's for it."""
    parser = Parser(prog="analyze.py", add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--atlas", action="store_true",
        help="one page of all models, each beside its initial weights; a RUN may be a YAML file of families "
             "(default: recipes/atlas.yaml), and what --output-dir has is not measured again")  # fmt: skip
    add("--names", nargs="+", metavar="NAME",
        help="of the configurations, one for each run; default: from the runs' paths")  # fmt: skip
    add("--num-images", type=nonneg_int, default=256, help="of the validation set; 0 = all (default: 256)")
    add("--output-dir", metavar="DIR", help="default: the run folder, or analysis for several runs, or atlas")
    add(
        "--overwrite",
        action="store_true",
        help="replace a redundancy.json or an atlas that was measured on other images",
    )
    add("--ema", action="store_true", help="measure the averaged weights")
    add("--layer", type=_block, default="last", metavar="BLOCK",
        help="whose heads are drawn: first, last or an index from 0 (default: last)")  # fmt: skip
    add("--image", type=nonneg_int, default=0, help="whose attention is drawn, of the first batch (default: 0)")
    add("--function-level", action="store_true",
        help="also accuracies without heads, patch tokens or blocks, k-NN and probes, on labelled images")  # fmt: skip
    add("--function-images", type=nonneg_int, metavar="N",
        help=f"validation images of --function-level, of all classes; 0 = all (default: {TEST_IMAGES})")  # fmt: skip
    add("--probe-images", type=nonneg_int, metavar="N",
        help=f"training images of its k-NN and probes; 0 = all (default: {PROBE_IMAGES})")  # fmt: skip
    add("--function-measures", nargs="+", choices=[*FUNCTION_MEASURES], metavar="NAME",
        help="of --function-level; default: all: %(choices)s")  # fmt: skip
    add("--extra-measures", nargs="+", default=[], choices=[name for name, entry in MEASURES.items() if entry.optional],
        metavar="NAME", help="measures that are off by default, as they take long: %(choices)s")  # fmt: skip
    add("--device", type=device_name, default="auto", help="auto, cuda or cpu")
    return parser


def _with_runs(parser: Parser) -> argparse.ArgumentParser:
    """The parser of the help, with RUN."""
    full = argparse.ArgumentParser(
        prog="analyze.py", description=__doc__.split("\n\n")[0], epilog="Further flags are main.py's.", parents=[parser]
    )
    full.add_argument("runs", nargs="*", metavar="RUN",
        help="run folder, checkpoint file, name of a timm model, or random; before the flags")  # fmt: skip
    return full


def _check(parser: Parser, options: argparse.Namespace):
    """Refuse a command line without a RUN, and flags that an atlas does not have."""
    if not options.atlas:
        if not options.runs:
            parser.error("the following arguments are required: RUN")
        return
    given = [name for name in NOT_OF_AN_ATLAS if getattr(options, name) != parser.get_default(name)]
    if given:
        parser.error(f"{flag_of(given[0])} is not of --atlas; measure the runs without --atlas")


def main(argv: list[str] | None = None):
    """Analyze the runs that a command line names; a mistake ends in one line and a non-zero exit."""
    settings, flags = parse(sys.argv[1:] if argv is None else argv)
    quiet_warnings()
    with one_line_errors(), loader_errors("start again"), joined_world(settings.pop("device"), "env://") as world:
        try:
            if settings.pop("atlas"):
                of_atlas = {name: value for name, value in settings.items() if name not in NOT_OF_AN_ATLAS}
                make_atlas(**of_atlas, flags=flags, world=world)
            else:
                analyze(**settings, flags=flags, world=world)
        except TapError as error:
            raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    run_command(main)
