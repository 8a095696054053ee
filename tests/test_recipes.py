"""recipes/: every recipe and every study is valid, says what it reaches, and has no value that it does not need."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY, log_of, run_main

from diversity import PRESETS, REMEDIES, DiversityObjective
from models import build_model
from studies.plan import plan_runs
from studies.study_file import read_study
from training import arguments, flag_warnings
from training.build import objective_settings
from training.flag_files import BASE

FOLDER = REPOSITORY / "recipes"
ATLAS = FOLDER / "atlas.yaml"
"""A list of models, which has no flags of a run."""
RECIPES = sorted({*FOLDER.glob("*.yaml")} - {ATLAS})
STUDIES = sorted((FOLDER / "studies").glob("*.yaml"))
RELEASED = PRESETS["released"].coefs
LEVELS = {"embedding": "emb_", "attention": "attn_", "weight": "weight_", "mixing": "mixing"}
TUNED = {
    "emb_offdiag_abscos_within": 0.5, "emb_contrast_cross": 0.5, "attn_offdiag_cos_within": 0.1,
    "weight_mha_cond_orth": 5e-4,
}  # fmt: skip

SIZES = {  # recipe: classes, parameters
    "deit_tiny": (1000, 5_717_416), "deit_small": (1000, 22_050_664), "deit_small_24layer": (1000, 43_344_232),
    "cifar_light": (10, 683_242), "vit_8x96": (10, 916_138), "vit_lite": (10, 3_722_250),
    "slvit": (10, 2_697_610), "slvit_cifar100": (100, 2_714_980), "slvit_tinyimagenet": (200, 2_734_280),
}  # fmt: skip


def name_of(value):
    return value.stem if isinstance(value, Path) else value


def parse(path, *words):
    return arguments.parse_args(["--config", str(path), *words])


def command_of(path):
    """The program and the words after it in the header of a file."""
    return shlex.split(header(path)["command"].removeprefix("python "))


def header(path):
    """{command, expected, duration: its text} of the comment that a file begins with; a line may end in a backslash."""
    comment = re.match(r"(?:#.*\n)+", path.read_text())[0]
    comment = re.sub(r" \\\n# +", " ", comment)
    return dict(re.findall(r"^# (\w+): (.+)$", comment, flags=re.MULTILINE))


@functools.cache
def runs_of(name):
    """{row: the flags that main.py gets for its first seed} of a study."""
    study = read_study(FOLDER / "studies" / f"{name}.yaml")
    return {run.row: run.args for run in plan_runs(study.chosen(None, study.seeds[:1]), Path("out"))}


def coefs_of(args):
    """{term: coefficient} of the terms that are on."""
    return {name: coef for name, coef in arguments.coefficients(args).items() if coef}


@pytest.mark.parametrize("path", [*RECIPES, *STUDIES, ATLAS], ids=name_of)
def test_a_header_has_the_command_what_to_expect_and_how_long_it_takes(path):
    facts = header(path)
    assert [*facts] == ["command", "expected", "duration"]
    assert max(map(len, path.read_text().splitlines())) <= 120
    assert re.search(r"%|not |point|table", facts["expected"])
    assert re.search("not measured|minute|hour|min ", facts["duration"])


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_the_command_of_a_recipe_is_that_of_its_file(path):
    program, *words = command_of(path)
    args = parse(path)
    if program == "main.py":
        assert words[:2] == ["--config", f"recipes/{path.name}"]
        assert parse(path, *words[2:]).output_dir.startswith("runs/")
    else:  # a launcher: the model is its first argument, or in its text
        assert re.search(rf"\b{args.model}\b", words[0] + (REPOSITORY / program).read_text())
        assert args.preset == ("released" if args.model.endswith("_diverse") else None)


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_the_command_of_a_study_is_that_of_its_file(path):
    program, *words = command_of(path)
    assert (program, words[0]) == ("study.py", f"recipes/studies/{path.name}")
    assert words[1].startswith("runs/")


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_needs_each_of_its_values(path):
    own = yaml.safe_load(path.read_text())
    base = own.pop(BASE, None)
    keys = re.findall(r"^(\w+):", path.read_text(), flags=re.MULTILINE)
    assert len({*keys}) == len(keys)
    args, before = parse(path), parse(path.parent / base) if base else arguments.parse_args([])
    for name, value in own.items():
        # The warm-up and the scaled versions are fractions of the epochs; weights may have been published with a crop.
        is_needed = name in ("epochs", "eval_crop_ratio")
        assert is_needed or getattr(args, name) != getattr(before, name), f"{name}: {value} changes nothing"
    assert flag_warnings.without_effect(args) == []


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_the_command_line_wins_over_a_recipe(path):
    words = ["--output-dir", "runs/x", "--resume", "auto", "--seed", "4", "--preset", "none", "--epochs", "50"]
    args = parse(path, *words)
    assert (args.output_dir, args.resume, args.seed, args.preset, args.epochs) == ("runs/x", "auto", 4, None, 50)
    assert coefs_of(args) == {}


def test_a_run_of_a_recipe_prints_its_values_and_resumes(tmp_path, few_digits, capsys):
    recipe = FOLDER / "digits.yaml"
    few = ["--device", "cpu", "--num-workers", 0, "--no-tensorboard"]
    few += ["--model-kwargs", "depth=1", "embed_dim=16", "num_heads=2"]
    words = ["--config", recipe, "--output-dir", tmp_path / "run", "--resume", "auto", *few]
    run_main(*words, "--epochs", 1)
    printed = capsys.readouterr().out.splitlines()
    (first,) = [number for number, line in enumerate(printed) if line.startswith(f"config {recipe}:")]
    text = " ".join(printed[first : first + 10])
    assert "--batch-size=32" in text and "--no-repeated-aug" in text and "depth=1 embed_dim=16" in text
    run_main(*words, "--epochs", 1)
    assert "has finished its 1 epochs" in capsys.readouterr().out
    run_main(*words, "--epochs", 2, "--resume-with-changes")
    assert [record["epoch"] for record in log_of(tmp_path / "run")] == [0, 1]
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["batch_size"] == 32


@pytest.mark.parametrize("name", SIZES)
def test_the_model_of_a_recipe_has_the_size_that_is_known(name):
    args = parse(FOLDER / f"{name}.yaml")
    classes, size = SIZES[name]
    model = build_model(args.model, classes, args.input_size, args.patch_size, 0.0, 0.0, **args.model_kwargs)
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    if name == "slvit":
        assert "2.7 M" in (FOLDER / "slvit.yaml").read_text().splitlines()[0]
        assert (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads) == (9, 192, 12)
        assert model.blocks[0].mlp.fc1.out_features == 2 * 192 and model.patch_embed.grid_size == (8, 8)


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_the_rows_of_a_study_differ_and_build_their_objectives(path):
    rows = runs_of(path.stem)
    assert next(iter(rows)) == "plain" and read_study(path).rows["plain"] == {}
    for args in rows.values():
        DiversityObjective(**objective_settings(args))
        assert [line for line in flag_warnings.without_effect(args) if "device is a CPU" not in line] == []
    own = [{**vars(args), "preset": None, "output_dir": ""} for args in rows.values()]
    assert all(own.count(args) == 1 for args in own)


@pytest.mark.parametrize("name", ["paper", "paper_cifar", "paper_digits"])
def test_the_rows_of_the_paper_are_each_term_each_level_and_all_but_one_level(name):
    level = {level: {term for term in RELEASED if term.startswith(begins)} for level, begins in LEVELS.items()}
    expected = {"plain": set(), "all": {*RELEASED}, "level_embedding": level["embedding"]}
    expected |= {f"only_{term}": {term} for term in RELEASED}
    expected |= {f"without_{level}": {*RELEASED} - terms for level, terms in level.items()}
    rows = runs_of(name)
    assert len(rows) == 12 and {*rows} == {*expected}
    for row, args in rows.items():
        assert coefs_of(args) == {term: RELEASED[term] for term in expected[row]}, row


def test_the_studies_of_presets_remedies_and_coefficients_have_all_of_them():
    assert {row: args.preset for row, args in runs_of("presets").items()} == {"plain": None} | {p: p for p in PRESETS}
    assert [args.remedy for args in runs_of("remedies").values()] == [[], *([name] for name in REMEDIES)]
    rows = runs_of("coefficients")
    factors = [(term, factor) for term in RELEASED for factor in ("0.1", "1", "10")]
    assert [*rows] == ["plain", *(f"{term}_x{factor}" for term, factor in factors)]
    for term, factor in factors:
        assert coefs_of(rows[f"{term}_x{factor}"]) == {term: pytest.approx(float(factor) * RELEASED[term])}


@pytest.mark.parametrize("name", ["small", "small_slvit"])
def test_the_small_studies_have_the_rows_of_the_rule(name):
    rows = runs_of(name)
    for row, more in (("tuned", {}), ("combined_cutmix", {"mixing": 0.5})):
        assert coefs_of(rows[row]) == TUNED | more and rows[row].attn_layers == "all"
    for row in ("combined_cutmix", "level_mixing"):
        assert (rows[row].mixing_balance, rows[row].mixing_where) == ("equal", "cutmix")
    for level, begins in LEVELS.items():
        terms = coefs_of(rows[f"level_{level}"])
        assert terms and all(term.startswith(begins) for term in terms)
    rule = (REPOSITORY / "docs" / "study" / "rule.md").read_text()
    assert all(f"`{row}`" in rule for row in rows)
    assert all(str(seed) in rule for seed in read_study(FOLDER / "studies" / f"{name}.yaml").seeds)


def table(paths):
    """The Markdown table of files: the first sentence of each head, what to expect, and how long it takes."""
    lines = ["| file | what | expected | duration |", "|---|---|---|---|"]
    for path in paths:
        paragraph = re.match(r"((?:# .*\n)+)", path.read_text())[0].replace("# ", "").replace("\n", " ")
        sentence = re.match(r".*?\.(?= )", paragraph)[0]
        facts = header(path)
        name = path.relative_to(FOLDER)
        lines.append(f"| [{name}](../recipes/{name}) | {sentence} | {facts['expected']} | {facts['duration']} |")
    return "\n".join(lines)


@pytest.mark.parametrize("paths", [RECIPES, STUDIES], ids=["recipes", "studies"])
def test_the_page_lists_them_as_their_heads_do(paths):
    assert table(paths) in (REPOSITORY / "docs" / "recipes.md").read_text()
