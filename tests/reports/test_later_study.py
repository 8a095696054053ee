"""docs/experiments.md shows the table of docs/study/background.jsonl as its command prints it."""

import json
import re
import shlex

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


def test_the_tables_have_every_run_of_the_file():
    lines = (REPOSITORY / FILE).read_text().splitlines()
    tables = PAGE.split("## A later study")[1].split("\n\n")
    counts = [
        int(count) for rows in tables if "top-1 raw" in rows for count in re.findall(r"^\| \w+ +\| (\d+) ", rows, re.M)
    ]
    assert sum(counts) == len(lines) == len(find_runs([REPOSITORY / FILE]))
    sets = {json.loads(line)["set"] for line in lines}
    assert sets == set(re.findall(r"^\| configuration, (\w+) ", PAGE, re.M))
