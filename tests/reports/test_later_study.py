"""docs/experiments.md shows the tables of the files in docs/study as their commands print them."""

import json
import re
import shlex
from statistics import fmean

from helpers import REPOSITORY

import table
from reports.run_folders import find_runs

PAGE = (REPOSITORY / "docs" / "experiments.md").read_text()
FILE = "docs/study/background.jsonl"


def test_the_page_ends_with_what_its_command_prints(capsys, monkeypatch):
    """Else run the two commands of the page that write its tables anew."""
    monkeypatch.chdir(REPOSITORY)
    (command,) = re.findall(rf"```bash\n(python table\.py {FILE} .*)\n```", PAGE)
    assert f"\n{command} >> docs/experiments.md\n" in PAGE
    table.main(shlex.split(command)[2:])
    assert PAGE.endswith("\n```\n\n" + capsys.readouterr().out)


def test_the_table_of_fine_tuning_is_what_its_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (command,) = re.findall(r"```bash\n(python table\.py docs/study/dinov2\.jsonl .*)\n```", PAGE)
    table.main(shlex.split(command)[2:])
    assert f"{command}\n```\n\n{capsys.readouterr().out}\n" in PAGE


def test_the_numbers_about_fine_tuning_are_those_of_its_records():
    runs = {}
    for line in (REPOSITORY / "docs" / "study" / "dinov2.jsonl").read_text().splitlines():
        record = json.loads(line)
        runs.setdefault(record["row"], []).append(record)
    assert {row: len(of_row) for row, of_row in runs.items()} == dict.fromkeys(
        ("plain", "released", "corrected", "tuned"), 5
    )

    def mean(row, value):
        return fmean(value(record["redundancy"]) for record in runs[row])

    components = {row: round(mean(row, lambda report: report["embedding"]["components_90"][-1])) for row in runs}
    assert components == {"plain": 68, "released": 9, "corrected": 9, "tuned": 58}
    by_head = {row: round(mean(row, lambda report: report["function"]["patch_probe"]["head"])) for row in runs}
    assert by_head == {"plain": 53, "released": 62, "corrected": 60, "tuned": 39}
    for layer in range(1, 13):
        accuracies = [mean(row, lambda report: report["function"]["knn"]["layers"][layer]) for row in runs]  # noqa: B023
        assert max(accuracies) - min(accuracies) < 2


def test_the_tables_have_every_run_of_the_file():
    lines = (REPOSITORY / FILE).read_text().splitlines()
    tables = PAGE.split("## A later study")[1].split("\n\n")
    counts = [
        int(count) for rows in tables if "top-1 raw" in rows for count in re.findall(r"^\| \w+ +\| (\d+) ", rows, re.M)
    ]
    assert sum(counts) == len(lines) == len(find_runs([REPOSITORY / FILE]))
    sets = {json.loads(line)["set"] for line in lines}
    assert sets == set(re.findall(r"^\| configuration, (\w+) ", PAGE.split("## A later study")[1], re.M))
