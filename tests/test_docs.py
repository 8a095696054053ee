"""README.md and docs/: commands parse, links and file names exist, tables equal the registries, the example runs."""

import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
from pathlib import Path

import pytest
from families import build
from helpers import REPOSITORY

import diversity
import study
from diversity.function_level import function_table
from diversity.measures import measures_table
from models import export, weights
from models.exporting import formats_table
from pipeline import evaluation_sets, sources
from studies.plan import plan_runs
from studies.study_file import read_study
from training import arguments
from training.log import accuracy_line, epoch_line, terms_table

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").rglob("*.md"))]
LINKING = [*PAGES, REPOSITORY / "LOG.md"]
TO_MAIN = re.compile(r"script/(quickstart|train_paper|run_|slurm_deit)")
"""Scripts that pass further flags to main.py."""
STUDIES = {
    "script/ablate_deit_small.sh": "paper", "script/slurm_ablate.sbatch": "paper",
    "script/ablate_cifar.sh": "paper_cifar", "script/ablate_digits.sh": "paper_digits",
}  # fmt: skip
"""{script: the study that it starts}; further flags are those of study.py and main.py."""
TERM_ROWS = diversity.markdown_table().splitlines()[2:]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def commands_of(text: str) -> list[str]:
    """The commands of a page: the lines of its bash blocks, and `python ...` in a sentence."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ").splitlines()
    commands = [*lines, *re.findall(r"`(python [\w/]+\.py[^`]*)`", text)]
    return [command for command in commands if command.strip()]


COMMANDS = [(name_of(page), command) for page in PAGES for command in commands_of(page.read_text())]


@pytest.fixture(scope="module")
def flags_of_program():
    """The flags that a program's --help lists."""

    @functools.cache
    def flags(program: str) -> set[str]:
        module = importlib.import_module(program.removesuffix(".py"))
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
            module.main(["--help"])
        assert ended.value.code == 0
        return set(re.findall(r"--[\w-]+", printed.getvalue()))

    return flags


def first_flag(words: list[str]) -> int:
    """The place of the first flag, or of the end without one."""
    return next((place for place, word in enumerate(words) if word.startswith("--")), len(words))


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_parses(page, command, flags_of_program):
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "sbatch":
        script = next(number for number, word in enumerate(words) if word.startswith("script/"))
        words = words[script:]
    if words[:2] in (["pip", "install"], ["python", "-c"]) or words[0] == "export":
        return
    if words[:3] == ["python", "-m", "models.export"]:
        export.build_parser().parse_args(words[3:])
        return
    program, *rest = words[1:] if words[0] == "python" else words
    assert (REPOSITORY / program).is_file()
    flags = [word.partition("=")[0].replace("_", "-") for word in rest if word.startswith("--")]
    program = program.removeprefix("./")
    config = rest[rest.index("--config") + 1] if "--config" in rest else None
    is_of_a_run = config is not None and not config.startswith("recipes/")  # its args.yaml, which is not here
    if program == "main.py" and "--help" not in flags and not is_of_a_run:
        arguments.parse_args(rest)
    elif program == "study.py" or program in STUDIES:
        file = f"recipes/studies/{STUDIES[program]}.yaml" if program in STUDIES else rest[0]
        options, of_main = study.build_parser().parse_known_args([file, "out", *rest[first_flag(rest) :]])
        plan_runs(read_study(REPOSITORY / file).chosen(options.rows, options.seeds), options.out, of_main)
    elif TO_MAIN.match(program) and flags:
        arguments.parse_args(rest[first_flag(rest) :])
    elif program in ("analyze.py", "table.py", "benchmark.py"):
        of_main = set() if program == "table.py" else {*arguments.build_parser()._option_string_actions}
        assert {*flags} <= flags_of_program(program) | of_main


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "gpu"], ids=name_of)
def test_every_flag_that_is_named_exists(page, flags_of_program):
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    named = {word.replace("_", "-") for span in spans for word in re.findall(r"(?<![\w-])--[\w-]*\w", span)}
    of_others = {"--slow", "--time", "--max-restarts"}  # of script/test.sh, sbatch and torchrun
    not_flags = {"--emb-cos", "--no"}  # an abbreviation, and the beginning of --no-...
    known = {*arguments.build_parser()._option_string_actions} | of_others | not_flags
    known |= {*export.build_parser()._option_string_actions}
    for program in ("analyze.py", "table.py", "benchmark.py", "study.py"):
        known |= flags_of_program(program)
    assert named <= known


def test_the_settings_of_malloc_are_those_of_the_quickstart():
    (exported,) = [command for _, command in COMMANDS if command.startswith("export MALLOC")]
    assert exported in (REPOSITORY / "script" / "quickstart.sh").read_text().splitlines()


def test_commands_are_found():
    assert len(COMMANDS) >= 25
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/reproduce.md", "docs/speed.md"}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_a_dead_anchor_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# What is it?\n\n```bash\n# a comment\n```\n\n## A `flag` and (more)\n")
    assert anchors(page) == {"what-is-it", "a-flag-and-more"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page):
    folders = "benchmarks|diversity|docs|models|pipeline|recipes|reports|script|studies|tests|training"
    named = re.findall(rf"`\.?/?((?:{folders})/[\w./]*|\w+\.(?:py|sh))[` ]", page.read_text())
    for name in named:
        assert (REPOSITORY / name).exists() or [*REPOSITORY.glob(f"*/{name}")], name


def test_the_index_has_every_page():
    index = (REPOSITORY / "docs" / "README.md").read_text()
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)\)", index))
    assert linked == {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}


def test_the_readme_has_at_most_150_lines():
    assert len(README.read_text().splitlines()) <= 150


def test_the_readme_shows_the_output_of_a_run():
    (block,) = re.findall(r"```\n(epoch 0 .*?)```", README.read_text(), flags=re.DOTALL)
    lines = block.splitlines()
    assert len(lines) == 11 and all(len(line) <= 100 for line in lines)
    for line in (lines[0], lines[2]):
        epoch, epochs, loss, raw, ema, speed, waited = map(float, re.findall(r"[\d.]+", line))
        record = {"epoch": int(epoch), "train_loss": loss, "test_acc1": raw, "test_acc1_ema": ema}
        assert epoch_line(record | {"train_images_per_s": speed, "train_data_wait": waited / 100}, int(epochs)) == line
    rows = [line.split()[:3] for line in lines[4:10]]
    record = {f"train_{name}": float(value) for name, value, _ in rows}
    record |= {f"train_{name}_share": float(percent) / 100 for name, _, percent in rows}
    assert terms_table(record).splitlines() == lines[3:10]
    assert lines[10] == accuracy_line({"acc1": raw, "acc1_ema": ema})


def test_the_table_of_terms_is_the_registrys():
    page = (REPOSITORY / "docs" / "terms.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `--")]
    assert rows[0].startswith("| `--mixing_coef` |")
    assert rows[1:] == TERM_ROWS


def test_the_table_of_taps_is_the_registrys():
    rows = [f"| `{tap.name}` | {tap.shape} | {' '.join(tap.doc.split())} |" for tap in diversity.TAPS.values()]
    assert "\n".join(["|---|---|---|", *rows, ""]) in (REPOSITORY / "docs" / "terms.md").read_text()


def test_the_table_of_measures_is_the_registrys():
    assert measures_table() in (REPOSITORY / "docs" / "analysis.md").read_text()
    assert function_table() in (REPOSITORY / "docs" / "analysis.md").read_text()


def test_the_table_of_remedies_is_the_registrys():
    assert diversity.remedies_table() in (REPOSITORY / "docs" / "remedies.md").read_text()


REFUSING = {
    "ViT, DeiT": ("vit", "average", "registers", "distilled", "deit3", "layerscale"),
    "ViTs with rotary embedding": ("eva02", "eva02_clip", "dinov3", "rope"),
    "BEiT, and EVA": ("beit", "beit_shared", "eva", "eva02_fused"),
    "Swin V1": ("swin", "swin_windows"),
    "Swin V2": ("swinv2",),
    "differential attention": ("differential",),
}
"""{beginning of a row of the models that refuse remedies: its models in families.py, or `VARIANTS` of them}"""

VARIANTS = {
    "layerscale": ("deit", {"init_values": 1e-5}),
    "differential": ("deit", {"attn_layer": "diff"}),
    "eva02_fused": ("eva02", {"qkv_fused": True}),  # as timm builds EVA-02 tiny and small
}


@pytest.mark.parametrize("models", REFUSING)
def test_the_remedies_that_models_refuse_are_listed(models):
    page = (REPOSITORY / "docs" / "remedies.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {models}")]
    listed = re.findall(r"`(\w+)`", row.split("|")[2])
    for name in REFUSING[models]:
        family, options = VARIANTS.get(name, (name, {}))
        model = build(family, **options)
        refused = []
        for remedy in diversity.REMEDIES:
            try:
                diversity.apply_remedy(model, remedy).remove()
            except diversity.RemedyError:
                refused.append(remedy)
        assert refused == listed, name


def test_the_readme_counts_the_remedies():
    assert "applies eleven of these" in README.read_text() and len(diversity.REMEDIES) == 11


def test_the_table_of_formats_is_the_registrys():
    assert formats_table() in (REPOSITORY / "docs" / "export.md").read_text()


def test_the_table_of_data_sets_is_the_registrys():
    assert sources.markdown_table() in (REPOSITORY / "docs" / "data.md").read_text()


def test_table_of_layouts():
    assert weights.layouts_table() in (REPOSITORY / "docs" / "weights.md").read_text()


def test_the_table_of_evaluation_sets_is_the_registrys():
    assert evaluation_sets.markdown_table() in (REPOSITORY / "docs" / "evaluation.md").read_text()


def test_the_readme_lists_the_wired_terms():
    rows = re.findall(r"^\| `--(\w+)_coef` \| \w+ \| ([\d.e-]+) \|", README.read_text(), flags=re.MULTILINE)
    assert {name: float(coef) for name, coef in rows} == diversity.PRESETS["released"].coefs


def test_the_table_of_presets_is_the_registrys():
    page = (REPOSITORY / "docs" / "presets-and-choices.md").read_text()
    rows = [
        f"| `{name}` | {listed(preset.coefs)} | {listed(preset.settings)} |".replace("|  |", "| |")
        for name, preset in diversity.PRESETS.items()
    ]
    assert [line for line in page.splitlines() if re.match(r"\| `[a-z]+` \|", line)] == rows


def listed(values: dict) -> str:
    return ", ".join(f"`{name}` {f'{value:f}'.rstrip('0').rstrip('.') if isinstance(value, float) else value}"
                     for name, value in values.items())  # fmt: skip


EXAMPLES = [
    (name_of(page), example)
    for page in PAGES
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    if "local-dir:" not in example  # of an exported run, which tests/models/exporting runs
    and "from transformers" not in example  # which tests/diversity/test_transformers_training.py runs
]


@pytest.mark.parametrize("example", [example for _, example in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_every_example_runs(example):
    names = {}
    exec(example, names)
    assert names["loss"].isfinite()
    assert "emb_cos_within" in names["terms"]
    assert names["model"].head.weight.grad is not None


def test_the_readme_has_an_example():
    assert [name for name, _ in EXAMPLES] == [
        "README.md",
        "docs/remedies.md",
        "docs/your-own-loop.md",
        "docs/your-own-loop.md",
    ]


def test_the_cost_model_is_arithmetic():
    """Forward and backward, two operations for each multiply-add: DeiT-Small at 224 px, 1,000 classes."""
    page = (REPOSITORY / "docs" / "speed.md").read_text()
    patches, tokens, dim, heads, classes = 196, 197, 384, 6, 1000
    mixing = 3 * 2 * patches * dim * classes / 1e9
    assert f"| {mixing:.2f} GFLOP per image, {100 * mixing / 27.5:.1f} % |" in page
    assert f"{heads * tokens**2:,} numbers per image" in page


def test_the_overview_can_be_drawn():
    draw_overview = runpy.run_path(str(REPOSITORY / "script" / "draw_overview.py"))
    panels = draw_overview["overview"]().subfigs[1].subfigs
    assert [panel.get_suptitle() for panel in panels] == [*draw_overview["LEVELS"]]
