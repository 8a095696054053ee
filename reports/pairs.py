"""Tables of pairs: of configurations by Welch's t, and of runs with the same seed by McNemar's test."""

import itertools
import json
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from reports.comparisons import by_configuration, row_values
from reports.rows import decimals_of, headings, side_by_side
from reports.runs import ACCURACIES, Run
from reports.statistics import (
    CONFIDENCE,
    NOT_SIGNIFICANT,
    Difference,
    holm,
    interval_text,
    mcnemar,
    p_text,
    signed,
    welch,
)
from training.predictions import read_predictions
from training.records import PREDICTIONS, SUMMARY
from utils import errors_of

PAIRWISE_LEGEND = (
    f"pairs of configurations: difference of the means [its {CONFIDENCE} confidence interval, of this pair alone] "
    "(p-value of Welch's t, corrected by Holm's method for all pairs of a column)",
    NOT_SIGNIFICANT,
)
MCNEMAR_LEGEND = (
    "pairs of runs of one seed: difference of the accuracies (gained: images that only the first run classifies "
    "correctly, lost: only the second; p-value of McNemar's exact test, of each pair alone); the images are the "
    "sample, so this compares two trained models, not two ways of training",
    NOT_SIGNIFICANT,
)
SAVED = {"test_acc1": "raw", "test_acc1_ema": "ema"}
"""{accuracy: name of its predictions in predictions.npz}"""


def pairwise_table(runs: list[Run], source: str | None, measures: list[str]) -> pd.DataFrame:
    """The differences between all pairs of configurations that have finished runs.

    `source` is the file that redundancy is read from.

    Returns:
        One row for each pair, with n and n_subtracted (finished runs of the two); for each accuracy and measure:
        <name>_difference, <name>_low, <name>_high and <name>_p of `statistics.welch`, and <name>_p_holm, corrected for
        all pairs.
    """
    finished = [run.configuration for run in runs if not run.problem]
    pairs = [*itertools.combinations(dict.fromkeys(finished), 2)]
    table = pd.DataFrame(index=[f"{second} - {first}" for first, second in pairs])
    table["n"] = [finished.count(second) for _, second in pairs]
    table["n_subtracted"] = [finished.count(first) for first, _ in pairs]
    for name, of_rows in row_values(runs, source, [*ACCURACIES, *measures]).items():
        differences = [welch(of_rows[second], of_rows[first]) for first, second in pairs]
        columns = pd.DataFrame(differences, table.index, Difference._fields, dtype=float).add_prefix(f"{name}_")
        table = table.join(columns)
        table[f"{name}_p_holm"] = holm([*columns[f"{name}_p"]])
    return table


def pairwise_texts(table: pd.DataFrame, of_rows: pd.DataFrame, measures: list[str]) -> list[dict[str, list[str]]]:
    """`pairwise_table` as text, in tables of one text for each pair.

    `of_rows` is the `statistics_table` of the same runs, whose number of digits the texts have.
    """
    counts = zip(table["n"], table["n_subtracted"], strict=True)
    first_columns = {"difference": [*table.index], "n": [f"{n}, {subtracted}" for n, subtracted in counts]}
    columns = {}
    for name, heading in headings(measures).items():
        decimals = decimals_of(of_rows, name)
        values = table[[f"{name}_{column}" for column in ("difference", "low", "high", "p_holm")]]
        texts = [(interval_text(*interval, decimals), p_text(p)) for *interval, p in values.itertuples(index=False)]
        columns[heading] = [f"{text} ({remark})" if remark else text or "-" for text, remark in texts]
    return [first_columns | part for part in side_by_side(columns)]


def mcnemar_table(groups: list[list[Run]], baseline: str, pairwise: bool) -> pd.DataFrame:
    """McNemar's test of the finished runs that have predictions, each with the baseline's run of the same seed.

    Args:
        groups: of runs that can be compared; those of the baseline come first.
        pairwise: each with the runs of all other configurations.

    Returns:
        One row for each pair, with the number of images; for each accuracy that both runs have: <name>_difference in
        points, <name>_gained (images that only the first run classifies correctly), <name>_lost and <name>_p.

    Raises:
        SystemExit: there is no pair; the images of one differ; predictions are damaged, or not of the run's last
            evaluation.
    """
    rows = {}
    with errors_of("--mcnemar:"):
        for base, run in _pairs(groups, baseline, pairwise):
            if (theirs := _read(base)) and (ours := _read(run)):
                if reason := _other_images(theirs, ours):
                    raise ValueError(f"{base.folder} and {run.folder} were evaluated on different images: {reason}")
                rows[f"{run.name} - {base.name}"] = _compare(ours, theirs)
        if not rows:
            one = "" if pairwise else f", one of them of {baseline} (--baseline, or --pairwise),"
            raise ValueError(
                f"no two comparable runs of one seed{one} have {PREDICTIONS}; train with --save-predictions, or start "
                "finished runs again with --resume auto --save-predictions"
            )
    return pd.DataFrame.from_dict(rows, orient="index")


def _pairs(groups: list[list[Run]], baseline: str, pairwise: bool) -> Iterator[tuple[Run, Run]]:
    """Finished runs of one seed of two configurations, the one to compare with first."""
    for runs in groups:
        of_rows = by_configuration([run for run in runs if not run.problem])
        for first, second in itertools.combinations(of_rows, 2):
            if pairwise or first == baseline:
                same_seed = itertools.product(of_rows[first], of_rows[second])
                yield from (pair for pair in same_seed if pair[0].flags["seed"] == pair[1].flags["seed"])


def without_pair(table: pd.DataFrame, runs: list[Run]) -> list[str]:
    """A line that names the finished runs without a row in `mcnemar_table`, and why; none if all have one."""
    paired = [f" - {pair} - " for pair in table.index]
    left = [run for run in runs if not run.problem and not any(f" - {run.name} - " in pair for pair in paired)]
    reasons = {True: "no comparable run of its seed", False: f"no {PREDICTIONS}"}
    names = [f"{run.name} ({reasons[(run.folder / PREDICTIONS).exists()]})" for run in left]
    return [f"not in McNemar's test: {', '.join(names)}"] if names else []


def mcnemar_texts(table: pd.DataFrame) -> dict[str, list[str]]:
    """`mcnemar_table` as columns of text, {heading: one text for each pair}."""
    columns = {"runs": [*table.index], "images": [f"{images:.0f}" for images in table["images"]]}
    for name, heading in ACCURACIES.items():
        if f"{name}_p" in table:
            values = table[[f"{name}_{column}" for column in ("difference", "gained", "lost", "p")]]
            columns[f"top-1 {heading}, points"] = [
                "-" if math.isnan(p) else f"{signed(points, 2)} ({gained:.0f} gained, {lost:.0f} lost, {p_text(p)})"
                for points, gained, lost, p in values.itertuples(index=False)
            ]
    return columns


def _read(run: Run) -> dict[str, np.ndarray] | None:
    """The arrays of a run's predictions; None without them.

    Raises:
        ValueError: they are damaged, or not of the evaluation that summary.json is from.
    """
    arrays = read_predictions(run.folder)
    if arrays is None:
        return None
    summary = json.loads((run.folder / SUMMARY).read_text())
    half_an_image = 50 / len(arrays["label"])  # in percent
    errors = [abs(100 * right.mean() - summary.get(key, math.nan)) for key, right in _is_right(arrays).items()]
    if arrays["epoch"] + 1 != summary["epochs"] or not all(error < half_an_image for error in errors):
        raise ValueError(
            f"{run.folder / PREDICTIONS} is not of the last evaluation, which {SUMMARY} is from; remove it, and start "
            "the run again with --resume auto --save-predictions"
        )
    return arrays


def _is_right(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{accuracy: whether each image is classified correctly}"""
    return {key: arrays[name] == arrays["label"] for key, name in SAVED.items() if name in arrays}


def _other_images(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> str | None:
    """How the images of two runs differ; None if they are the same."""
    if len(first["image"]) != len(second["image"]):
        return f"{len(first['image'])} and {len(second['image'])} images"
    if first["val_digest"] != second["val_digest"]:
        return f"validation files {first['val_digest']} and {second['val_digest']}"
    same = all(np.array_equal(first[name], second[name]) for name in ("image", "label"))
    return None if same else "their labels"


def _compare(arrays: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, float]:
    """A row of `mcnemar_table`."""
    ours, theirs = _is_right(arrays), _is_right(base)
    row = {"images": len(arrays["label"])}
    for key in [key for key in ours if key in theirs]:
        test = mcnemar(ours[key], theirs[key])
        row[f"{key}_difference"] = 100 * (test.gained - test.lost) / row["images"]
        row |= {f"{key}_{name}": value for name, value in test._asdict().items()}
    return row
