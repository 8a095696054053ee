"""The paper-style table of a study, built from its run folders or their records alone.

    python table.py runs/study --format latex --output table.tex --curves curves.png

A configuration of the study, one row, is a set of runs that differ only in their seed: runs/study/plain/seed0, seed1,
... Only finished runs are averaged; the others are listed below the table. Redundancy is compared only if all runs were
measured in the same way: by analyze.py, else by main.py in the last epoch. A .jsonl file has records of finished runs,
which study.py --collect writes; each of its data sets has its own tables.
"""

import signal
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback of an import; see `run_command`

from reports.chosen_measures import DEFAULT_MEASURES
from reports.runs import RESULTS
from reports.study_table import write_table
from training.parsing import Parser
from utils import run_command


def main(argv: list[str] | None = None):
    """Write the table that a command line describes."""
    parser = Parser(prog="table.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "out",
        nargs="+",
        metavar="OUT",
        help="run folder, folder that is searched for run folders, or .jsonl file of records",
    )
    add("--format", choices=("markdown", "latex", "csv"), default="markdown", help="default: markdown")
    results = ", ".join(RESULTS)
    add("--measures", nargs="*", metavar="NAME",
        help=f"of redundancy, or {results} of the last epoch; default: {' '.join(DEFAULT_MEASURES)}")  # fmt: skip
    add("--baseline", default="plain", metavar="CONFIGURATION", help="to compare with; default: plain")
    add("--pairwise", action="store_true",
        help="also compare each configuration with each other one; as csv, these pairs are the table")  # fmt: skip
    add("--mcnemar", action="store_true",
        help="also compare runs of one seed image by image (predictions.npz); as csv, these are the table")  # fmt: skip
    add("--curves", type=Path, metavar="FILE.png", help="draw training curves, also as PDF; default: none")
    add("--output", type=Path, metavar="FILE", help="write the table there; default: print it")
    args = parser.parse_args(argv)
    if args.curves and args.curves.suffix != ".png":
        parser.error(f"--curves needs a file that ends in .png; got {args.curves}")
    write_table(
        args.out, args.format, args.measures, args.baseline, args.output, args.curves, args.pairwise, args.mcnemar
    )


if __name__ == "__main__":
    run_command(main)
