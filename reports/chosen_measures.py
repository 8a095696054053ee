"""Which measures of redundancy a table of runs shows, and which measurement of them: only equal ones are compared."""

from diversity.spelling import did_you_mean
from reports.runs import MAY_LACK, PROVENANCE, REPORT, RESULTS, Run
from reports.tables import known_measures
from training.records import LOG

DEFAULT_MEASURES = (
    *("embedding_token_cosine_last", "embedding_token_abscosine_last", "embedding_participation_ratio_last"),
    *("attention_head_cosine_first", "weight_condition_number_qkv", "weight_row_abscosine_qkv"),
)
PAGE_MEASURES = (
    *("function_patch_probe", "function_knn_last", "function_tokens_50_random", "function_heads_50_random"),
    *("embedding_token_abscosine_last", "attention_head_cosine", "weight_row_abscosine_qkv"),
    "circuit_effective_rank_qk",
)
"""Outcomes beside the accuracy on the page of a study, where they were measured; docs/study/rule.md names them."""
FORMER = {"embedding_participation_ratio_last": "embedding_effective_rank_last"}
"""{a default measure: what earlier versions measured in its place, shown where no run has the default one}."""


def choose_measures(names: list[str] | None, runs: list[Run]) -> tuple[str | None, list[str], list[str]]:
    """The file that redundancy is read from, those of the measures that the finished runs have, and notes on them.

    Among the names may be `RESULTS`, which come first. No names are the runs' own measures and `DEFAULT_MEASURES`,
    without a note if there is no redundancy at all.
    """
    files = {name: str(run.study.parent) for run in runs if not run.problem for name in run.own_measures}
    own = [name for name in (files if names is None else names) if name in files]
    results = [name for name in dict.fromkeys(names or ()) if name in RESULTS]
    others = [name for name in (DEFAULT_MEASURES if names is None else names) if name not in {*files, *results}]
    source, measured, notes = _choose_measures([*dict.fromkeys(others)], names is None, runs)
    if own:
        program = " and ".join(dict.fromkeys(files[name] for name in own))
        notes.append(f"{', '.join(dict.fromkeys(own))}: as the program of {program} defines them, not analyze.py")
    logged = {name for run in runs if not run.problem for name in results if run.records[-1].get(name) is not None}
    if missing := [name for name in results if name not in logged]:
        notes.append(f"no finished run has {', '.join(missing)} in its {LOG}")
    return source, [*(name for name in results if name in logged), *dict.fromkeys(own), *measured], notes


def _choose_measures(chosen: list[str], are_default: bool, runs: list[Run]) -> tuple[str | None, list[str], list[str]]:
    """The same for measures that are not the runs' own."""
    source, note = choose_redundancy(runs)
    if not chosen or (are_default and note is None):
        return None, [], []
    if source is None:
        return None, [], [note or "redundancy: not in the table, as no finished run has any measures"]
    measured = {name for run in runs if not run.problem for name in run.redundancy[source].measures}
    if are_default:
        chosen = [FORMER[name] if name not in measured and FORMER.get(name) in measured else name for name in chosen]
    missing = [name for name in chosen if name not in measured]
    note += f"; it lacks {', '.join(missing)}" if missing else ""
    function_level = any(name.startswith("function_") for name in missing)
    note += " (analyze.py --function-level measures what begins with function_)" if function_level else ""
    return source, [name for name in chosen if name in measured], [note]


def page_measures(runs: list[Run]) -> list[str]:
    """The measures that the page of a study has: the runs' own, and those of `PAGE_MEASURES` that a run has.

    Without any of them these are all, for the note that there are none.
    """
    finished = [run for run in runs if not run.problem]
    own = dict.fromkeys(name for run in finished for name in run.own_measures)
    measured = {name for run in finished for of_source in run.redundancy.values() for name in of_source.measures}
    return [*own, *(name for name in PAGE_MEASURES if name in measured)] or [*PAGE_MEASURES]


def check_measures(names: list[str], runs: list[Run]):
    """Find names of measures that do not exist.

    Raises:
        SystemExit: a name is neither a measure of this project nor in any run.
    """
    sources = [(run.own_measures, *(measured.measures for measured in run.redundancy.values())) for run in runs]
    in_runs = {name for of_run in sources for measures in of_run for name in measures}
    known = sorted({*known_measures(), *in_runs})
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known, ".")
            raise SystemExit(f"error: unknown measure {name}{hint} There are {', '.join(known)}")


def choose_redundancy(runs: list[Run]) -> tuple[str | None, str | None]:
    """The one source from which the redundancy of all runs is read, so that only equal measurements are compared.

    Returns:
        source: the first of REPORT and LOG in which all finished runs were measured in the same way after their last
            epoch, or None.
        note: what was measured, or why nothing is compared; None where nothing was measured.
    """
    finished = [run for run in runs if not run.problem]
    if not any(run.redundancy for run in finished):
        return None, None
    reasons = []
    for source in (REPORT, LOG):
        reason = reason_against(source, finished)
        if reason is None:
            values = finished[0].redundancy[source].provenance
            known = [name for name in PROVENANCE if values[name] is not None and name != "files"]
            words = [PROVENANCE[name].format(values[name]) for name in known]
            skipped = reasons and any(REPORT in run.redundancy for run in finished)
            instead = f", as {reasons[0]}" if skipped else ""
            return source, f"redundancy: measured after the last epoch on {', '.join(words)} ({source}{instead})"
        reasons.append(reason)
    return None, f"redundancy: not in the table, as {' and '.join(reasons)}; run analyze.py on all runs in the same way"


def reason_against(source: str, runs: list[Run]) -> str | None:
    """Why a source does not serve for all runs; None if it does."""
    for number, run in enumerate(runs):
        if source not in run.redundancy:
            return f"{run.name} has none in {REPORT if source == REPORT else f'the last epoch of {LOG}'}"
        theirs, last = run.redundancy[source], run.records[-1]["epoch"]
        if theirs.epoch != last:
            epoch = "an unknown epoch" if theirs.epoch is None else f"epoch {theirs.epoch}"
            return f"the {source} of {run.name} is of {epoch}, not of its last, {last}"
        for name, text in PROVENANCE.items():
            know = [one for one in runs[: number + 1] if one.redundancy[source].provenance[name] is not None]
            first = know[0] if know and name in MAY_LACK else runs[0]
            values = first.redundancy[source].provenance[name], theirs.provenance[name]
            if values[0] != values[1] and not (name in MAY_LACK and None in values):
                values = [*map(text.format, values)]
                return f"in {source}, {first.name} was measured on {values[0]}, {run.name} on {values[1]}"
    return None
