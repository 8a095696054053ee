"""Train the rows of a study with its seeds, one after the other or side by side, and report on them.

    python study.py recipes/studies/paper_cifar.yaml runs/cifar --data-path /path/to/cifar --seeds 0 1 2 --report

The run of a row with a seed has the folder OUT/ROW/seedK. The same command again skips finished runs, resumes
interrupted ones, and refuses those that were trained with other flags. A run that fails does not stop the others; the
last line names all that failed. After a signal, or the end of --budget, with runs left the exit code is 75.
"""

import difflib
import os
import shlex
import signal
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from argparse import BooleanOptionalAction as Switch
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback of an import; see `run_command`

import torch

from models.flag_types import positive_float, positive_int, with_hyphens
from reports.run_folders import find_runs, read_run
from reports.run_records import restore_run, write_records
from studies.commands import Settings
from studies.jobs import Jobs, Outcome, tell
from studies.plan import PlannedRun, errors_in, flags_as_words, plan_runs
from studies.processes import Processes
from studies.run_state import State, check_flags, is_finished, recorded_runs
from studies.study_file import Study, read_study
from training import arguments
from training.flags import build_parser as build_main_parser
from training.parsing import Parser, nonneg_int, seed_int
from training.stopping import RESUMABLE, StopSignals
from utils import run_command


def build_parser() -> Parser:
    """The parser of this program's own flags."""
    parser = Parser(
        prog="study.py",
        description=__doc__.split("\n\n")[0],
        epilog="Further flags are main.py's, for all runs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="rows, seeds and a recipe: see studies/study_file.py")
    add("out", type=Path, metavar="OUT", help="folder of the run folders ROW/seedK; both before the flags")
    add("--rows", nargs="+", metavar="ROW", help="default: all of the study")
    add("--seeds", nargs="+", type=seed_int, metavar="SEED", help="default: those of the study")
    add("--jobs", type=positive_int, default=1, metavar="N",
        help="runs side by side on one device, each with its output in its console.log (default: 1)")  # fmt: skip
    add("--nproc-per-node", type=_processes, default=1, metavar="N",
        help="processes of a run, started by torchrun; auto = one for each GPU (default: 1)")  # fmt: skip
    add("--budget", type=positive_float, metavar="MINUTES",
        help="start no run that would take longer than is left, by the longest one so far, and stop those that run at "
        "the end, which save (default: no limit)")  # fmt: skip
    add("--task", type=nonneg_int, metavar="K", help="of --tasks, from 0 (default: SLURM_ARRAY_TASK_ID, or 0)")
    add("--tasks", type=nonneg_int, metavar="N",
        help="do only the runs K, K + N, K + 2 N ... (default: SLURM_ARRAY_TASK_COUNT, or 1)")  # fmt: skip
    add("--dry-run", action="store_true", help="print the commands, one per line, and run nothing")
    add("--keep-weights", action=Switch, default=True,
        help="keep the checkpoints of runs that are finished and analysed (default: on)")  # fmt: skip
    add("--report", action="store_true", help="at the end write tables, figures and a page into OUT/report")
    add("--also", nargs="+", type=Path, default=[], metavar="FILE.jsonl",
        help="records of other studies, shown in the report beside")  # fmt: skip
    add("--collect", type=Path, metavar="FILE.jsonl",
        help="write a record of each run there when it is finished; a run whose record it has already is finished, and "
        "gets a run folder without weights")  # fmt: skip
    return parser


def _processes(text: str) -> int:
    """A number of processes; for "auto" that of the GPUs, or 1 without any."""
    if text == "auto":
        return torch.cuda.device_count() or 1
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"is auto or an integer >= 1; got {text!r}")
    return int(text)


def main(argv: list[str] | None = None):
    """Run the study that a command line describes."""
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    args, user_flags = parser.parse_known_args([with_hyphens(word) for word in argv])
    check_spelling(parser, user_flags)
    study = read_study(args.study).chosen(args.rows, args.seeds)
    budget = args.budget and 60 * args.budget
    settings = Settings(study.analyze, args.keep_weights, args.jobs, args.nproc_per_node, budget)
    runs = plan_runs(study, args.out, user_flags)
    check_analysis(study)
    for file in args.also:
        find_runs([file])  # refuses, before the first run, a file that is not there
    own = _of_task(runs, args.task, args.tasks)
    recorded = recorded_runs(own, args.collect) if args.collect else {}
    if args.dry_run:
        own = [run for run in own if run.name not in recorded]
    warnings = []
    for run in own:
        if run.name in recorded:
            restore_run(recorded[run.name], run.folder)
        warnings.append(check_flags(run, settings.num_processes))
    for warning in dict.fromkeys(filter(None, warnings)):
        tell(warning)
    if args.dry_run:
        return print_commands(own, settings)
    outcome = train(own, settings, args.collect)
    if outcome.signal:
        tell(f"{args.out}: stopped; start the same command again to continue")
        raise SystemExit(RESUMABLE)
    report(study, runs, settings, args, argv)
    if outcome.failed:
        raise SystemExit(f"failed: {' '.join(outcome.failed)}")
    if outcome.left:
        tell(f"left; start the same command again to continue: {' '.join(outcome.left)}")
        raise SystemExit(RESUMABLE)


def check_spelling(parser: Parser, words: Sequence[str]):
    """Refuse a flag that neither program has, and that is most like one of `parser`, which main.py could not suggest.

    Raises:
        SystemExit: there is such a flag among the words for main.py.
    """
    main_flags = build_main_parser().flags
    for word in words:
        flag = word.partition("=")[0]
        if not flag.startswith("--") or flag in main_flags:
            continue
        nearest = difflib.get_close_matches(flag, [*main_flags, *parser.flags], n=1)
        if nearest and nearest[0] not in main_flags:
            parser.error(f"unknown argument {word}; did you mean {nearest[0]}?")


def check_analysis(study: Study):
    """Refuse words for analyze.py that it would refuse when the first run is finished.

    Raises:
        SystemExit: a flag is unknown or out of range, or one that a study sets.
    """
    if study.analyze is None:
        return
    import analyze  # here, as matplotlib takes a second to import

    with errors_in(f"{study.path}, analyze"):
        settings, flags = analyze.parse(["RUN", *study.analyze])
        if settings["runs"] != ["RUN"] or settings["output_dir"]:
            raise SystemExit("it has flags only, without a RUN and --output-dir")
        arguments.parse_args(flags)


def _of_task(runs: Sequence[PlannedRun], task: int | None, tasks: int | None) -> Sequence[PlannedRun]:
    """The runs of this process among those of an array.

    Raises:
        SystemExit: there is no such task, so that runs would be missing.
    """
    words = {"SLURM_ARRAY_TASK_ID": (task, "0"), "SLURM_ARRAY_TASK_COUNT": (tasks, "1")}
    number, count = (os.environ.get(name, default) if given is None else str(given)
                     for name, (given, default) in words.items())  # fmt: skip
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise SystemExit(
            f"error: there is no task {number} of {count}: tasks count from 0; for a part of an array, set --tasks to "
            "its size"
        )
    return runs[int(number) :: int(count)]


def print_commands(runs: Sequence[PlannedRun], settings: Settings):
    """Print what `train` would start."""
    for run in runs:
        tell(f"{run.name}: {settings.state(run).value}")
        variables = [f"{name}={value}" for name, value in settings.environment(run).items()]
        for command in settings.commands(run).values():
            print(shlex.join(["env", *variables, *command]))


def train(runs: Sequence[PlannedRun], settings: Settings, records: Path | None) -> Outcome:
    """Train and analyse runs in processes that do not outlive this one; each that ends gets its record at once."""
    with StopSignals() as signals, Processes() as processes:

        def start(run: PlannedRun, command: list[str], log: Path | None) -> subprocess.Popen:
            return processes.start(command, log, settings.environment(run))

        def record(run: PlannedRun):
            if records:
                collect([run], settings, records)

        return Jobs(settings, start, lambda: signals.received, record).run(runs)


def collect(runs: Sequence[PlannedRun], settings: Settings, records: Path) -> int:
    """Write the records of the finished and analysed ones among `runs`; returns the number of records in the file."""
    finished = [run for run in runs if is_finished(run) and settings.state(run) == State.FINISHED]
    return write_records([read_run(run.folder, run.row) for run in finished], records)


def report(study: Study, runs: Sequence[PlannedRun], settings: Settings, args: Namespace, argv: Sequence[str]):
    """Write what --report and --collect ask for."""
    if not (args.report or args.collect):
        return
    if not any(is_finished(run) for run in runs):
        return tell("no run has finished: neither report nor records are written")
    if args.report:
        from reports import study_report  # here, as matplotlib takes a second to import

        rows = {row: shlex.join(flags_as_words(flags)) for row, flags in study.rows.items()}
        lines = [f"command: {shlex.join(['python', 'study.py', *argv])}"]
        lines += [f"recipe: {study.recipe}"] if study.recipe else []
        lines += [f"flags of all rows: {shlex.join(flags_as_words(study.flags))}"] if study.flags else []
        asked = study_report.Asked(study.path.stem, rows, study.seeds, study.baseline, lines)
        measure = args.budget is None  # which takes time
        page = study_report.write_report(asked, [args.out], args.out / "report", args.also, measure)
        tell(f"report: {page}")
    if args.collect:  # after the report, which may have measured runs
        tell(f"{args.collect} has {collect(runs, settings, args.collect)} records")


if __name__ == "__main__":
    run_command(main)
