"""Study files and the runs that follow from them: flags, order, mistakes, arrays of tasks, and the commands printed."""

import re
import shlex
import subprocess

import pytest
import yaml
from helpers import REPOSITORY
from studying import ROWS, TINY_FLAGS, tiny_runs, write_study

import study
from diversity import PRESETS, REGULARIZERS
from studies.plan import plan_runs
from studies.study_file import read_study
from training import arguments, flag_warnings
from training.parsing import flag_of

EMBEDDING = ["emb_cos_within", "emb_contrast_cross"]
LEVELS = {"mixing": ["mixing"], "embedding": EMBEDDING, "attention": ["attn_cos_within"],
          "weight": ["weight_mha_cond_orth"]}  # fmt: skip
FIVE = [term for terms in LEVELS.values() for term in terms]
PAPER = {
    "plain": [],
    **{f"only_{term}": [term] for term in FIVE},
    "level_embedding": EMBEDDING,
    **{f"without_{level}": [term for term in FIVE if term not in terms] for level, terms in LEVELS.items()},
    "all": FIVE,
}
STUDIES = sorted((REPOSITORY / "recipes" / "studies").glob("*.yaml"))


def differing(one, other):
    return {name for name, value in vars(one).items() if value != getattr(other, name)}


@pytest.fixture(autouse=True)
def no_array(monkeypatch):
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dry_run(capsys):
    """dry_run(*words) of study.py returns the commands that it prints, as words behind main.py or analyze.py."""

    def run(*words):
        study.main([*map(str, words), "--dry-run"])
        commands = [*map(shlex.split, capsys.readouterr().out.splitlines())]
        places = [next(i for i, word in enumerate(words) if word.endswith(".py")) for words in commands]
        return [words[place + 1 :] for place, words in zip(places, commands, strict=True)]

    return run


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_of_the_repository_can_be_planned(path, tmp_path):
    of_file = read_study(path)
    runs = plan_runs(of_file.chosen(None, of_file.seeds[:1]), tmp_path)
    assert [run.row for run in runs] == list(of_file.rows)
    own = {"output_dir"}
    trained = [tuple((name, str(value)) for name, value in vars(run.args).items() if name not in own) for run in runs]
    assert len({*trained}) == len(runs)  # no two rows are the same
    assert of_file.baseline in of_file.rows
    for run in runs:
        idle = {line.split()[0] for line in flag_warnings.without_effect(run.args)}
        assert not idle & {*map(flag_of, of_file.rows[run.row])}


@pytest.mark.parametrize("name", ["paper", "paper_cifar", "paper_digits"])
def test_every_row_of_the_paper_has_its_terms(name, tmp_path):
    runs = plan_runs(read_study(REPOSITORY / "recipes" / "studies" / f"{name}.yaml"), tmp_path)
    assert [run.row for run in runs] == list(PAPER)
    released = PRESETS["released"].coefs
    for run, terms in zip(runs, PAPER.values(), strict=True):
        expected = {term: released[term] if term in terms else 0 for term in ("mixing", *REGULARIZERS)}
        assert arguments.coefficients(run.args) == expected
        assert differing(run.args, runs[-1].args) <= {"output_dir", *(f"{term}_coef" for term in FIVE)}
        assert run.args.preset is None  # args.yaml names no preset, since the run does not train one


def test_deit_small_has_the_recipe_of_the_papers_run(tmp_path):
    *_, run = plan_runs(read_study(REPOSITORY / "recipes" / "studies" / "paper.yaml"), tmp_path)
    paper = arguments.parse_args(["--config", str(REPOSITORY / "recipes" / "deit_small_diverse.yaml")])
    assert differing(run.args, paper) <= {"preset", "config", "output_dir", "resume", "redundancy_every"}


def test_seeds_are_outermost_and_each_run_has_its_folder_and_flags(tmp_path):
    runs = tiny_runs(tmp_path, "--epochs", "7", "--min_lr=0", seeds=[3, 0])
    assert [run.name for run in runs] == ["plain/seed3", "mixing/seed3", "plain/seed0", "mixing/seed0"]
    for run in runs:
        assert run.folder == tmp_path / "out" / run.row / f"seed{run.seed}"
        assert (run.args.output_dir, run.args.seed, run.args.resume) == (str(run.folder), run.seed, "auto")
        assert (run.args.epochs, run.args.min_lr, run.args.mixing_coef) == (7, 0, float(run.row == "mixing"))
        assert arguments.parse_args(run.words) == run.args


def test_flags_of_a_row_are_over_those_of_all_rows_and_those_over_the_recipe(tmp_path):
    recipe = {"epochs": 9, "lr": 0.1, "drop": 0.3, "model_kwargs": {"depth": 6, "embed_dim": 48}, "preset": "released"}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base.yaml").write_text(yaml.safe_dump({"warmup_epochs": 2}))
    (tmp_path / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(recipe | {"base": "base.yaml"}))
    rows = {
        "plain": {"preset": "none"},
        "registers": {"model-kwargs": {"reg_tokens": 2}, "lr": 0.3, "model_ema": False},
    }
    flags = {"lr": 0.2, "epochs": 5, "model_kwargs": {"embed_dim": 24, "num_heads": 3}}
    plain, registers = tiny_runs(tmp_path, recipe="recipes/tiny.yaml", flags=flags, rows=rows)
    assert (plain.args.epochs, plain.args.lr, plain.args.drop, plain.args.warmup_epochs) == (5, 0.2, 0.3, 2)
    assert plain.args.model_kwargs == {"depth": 6, "embed_dim": 24, "num_heads": 3}
    assert not any(arguments.coefficients(plain.args).values())
    assert (registers.args.lr, registers.args.model_ema) == (0.3, False)
    assert registers.args.model_kwargs == plain.args.model_kwargs | {"reg_tokens": 2}
    assert arguments.coefficients(registers.args)["mixing"] == 1


def test_rows_of_another_file_come_first(tmp_path):
    write_study(tmp_path, "other.yaml", rows=ROWS, baseline="mixing", seeds=[5], flags={"lr": 1})
    path = write_study(tmp_path, rows_from="other.yaml", rows={"own": {"lr": 0.5}})
    found = read_study(path)
    assert list(found.rows) == ["plain", "mixing", "own"]
    assert (found.baseline, found.seeds, found.flags) == ("mixing", [0], TINY_FLAGS)
    assert list(read_study(write_study(tmp_path, rows_from="other.yaml", rows=None)).rows) == ["plain", "mixing"]
    write_study(tmp_path, rows_from="other.yaml", rows={"plain": {}})
    with pytest.raises(SystemExit, match=r"row plain is also one of rows_from"):
        read_study(path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("row: {plain: {}}", "unknown key row; did you mean rows?"),
        ("flags: {lr: 1}", "has no rows"),
        ("patch_size: 8", "unknown key patch_size; there are recipe, rows_from, seeds"),
        ("rows: [plain]", "rows must have a `name: {flag: value}` pair"),
        ("rows: {plain: {}, plain: {lr: 1}}", "plain is there twice"),
        ("rows: {plain: {lr: 1, lr: 2}}", "lr is there twice"),
        ("rows: {plain: {}, no: {}}", "row False cannot name a folder"),
        ("rows: {a/b: {}}", "row a/b cannot name a folder"),
        ("rows: {report: {}}", "row report cannot name a folder"),
        ("rows: {plain: lr}", "row plain must have `flag: value` pairs; it is lr"),
        ("rows: {plain: {seed: 3}}", "row plain has seed, which is not for a study"),
        ("rows: {plain: {}}\nflags: {output-dir: x}", "flags has output_dir, which is not for a study"),
        ("rows: {plain: {}}\nseeds: 3", "seeds must be a list of different integers from 0 to below 2^31; it is 3"),
        ("rows: {plain: {}}\nseeds: [1, 1]", "seeds must be a list of different integers"),
        ("rows: {plain: {}}\nseeds: [-1]", "seeds must be a list of different integers"),
        ("rows: {plain: {}, mixing: {}}\nbaseline: plane", "baseline plane is not a row; did you mean plain?"),
        ("rows: {plain: {}}\nrecipe: no.yaml", "no.yaml cannot be read"),
        ("rows_from: no.yaml", "no.yaml cannot be read"),
        ("rows_from: study.yaml", "which has rows_from study.yaml; name one that has `rows`"),
        ("plain", "must have one `key: value` pair per line"),
        (
            "rows: {plain: {}, last: {mixing_coeff: 1}}",
            "row last: unknown argument --mixing-coeff=1; did you mean --mix",
        ),
        ("rows: {plain: {}, last: {lr: fast}}", "row last: argument --lr: needs a finite number > 0; got 'fast'"),
        ("rows: {plain: {}, last: {no_epochs: true}}", "row last: unknown argument --no-epochs"),
        ("rows: {plain: {}, last: {batch_size: 3}}", "row last: --batch-size 3 is odd"),
        ("rows: {plain: {}}\nanalyze: --num-images many", "analyze: argument --num-images: needs an integer >= 0"),
        ("rows: {plain: {}}\nanalyze: --num-imagse 3", "analyze: unknown argument --num-imagse"),
        ("rows: {plain: {}}\nanalyze: --output-dir x", "analyze: it has flags only"),
        ("rows: {plain: {}}\nanalyze: other --ema", "analyze: it has flags only"),
        ("rows: {plain: {}}\nanalyze: it's", "analyze must be words for analyze.py; it is it's"),
        ("rows: {plain: {}}\nanalyze: 3", "analyze must be words for analyze.py; it is 3"),
    ],
)
def test_a_mistake_in_a_study_file_is_one_line(text, found, tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        study.main([str(path), str(tmp_path / "out")])
    line = caught.value.code
    assert line.startswith("error: ") and str(tmp_path) in line and "\n" not in line
    assert found in line
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--seed=1", "--seed is not for a study"),
        ("--output_dir x", "--output-dir is not for a study"),
        ("--resume auto", "--resume is not for a study"),
        ("--config x.yaml", "--config is not for a study"),
        ("--no-resume-with-changes", "--resume-with-changes is not for a study"),
        ("--mixing_coef 1", "--mixing-coef differs between the rows of"),
        ("--preset corrected", "differs between the rows of"),
        ("--emb-cos-within-coef=1", "--emb-cos-within-coef differs between the rows of"),
        ("--epohcs 3", "row plain: unknown argument --epohcs; did you mean --epochs"),
        ("--job 2", "unknown argument --job; did you mean --jobs?"),
        ("--row plain", "unknown argument --row; did you mean --rows?"),
        ("--also nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("--rows plain plane", "--rows plane is not a row of"),
        ("--seeds -1", "argument --seeds: needs an integer from 0"),
        ("--nproc-per-node two", "argument --nproc-per-node: is auto or an integer >= 1; got 'two'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, found, tmp_path, capsys):
    path = write_study(tmp_path, rows=ROWS | {"released": {"preset": "released"}})
    with pytest.raises(SystemExit) as caught:
        study.main([str(path), str(tmp_path / "out"), *words.split()])
    line = caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err
    assert line.startswith("error: ") and found in line
    assert not (tmp_path / "out").exists()


def test_a_flag_that_differs_between_other_rows_alone_is_the_users(tmp_path, dry_run):
    path = write_study(tmp_path)
    (words,) = dry_run(path, tmp_path / "out", "--rows", "plain", "--mixing-coef", "2", "--seeds", 4)
    args = arguments.parse_args(words)
    assert (args.mixing_coef, args.seed) == (2, 4)


def test_a_dry_run_prints_commands_that_parse(tmp_path, dry_run):
    path = write_study(tmp_path, seeds=[0, 1], analyze="--num-images 16 --function-level")
    printed = dry_run(path, tmp_path / "my out", "--rows", "mixing", "plain")
    train, analyze = printed[::2], printed[1::2]
    names = ["mixing/seed0", "plain/seed0", "mixing/seed1", "plain/seed1"]
    folders = [arguments.parse_args(words).output_dir for words in train]
    assert folders == [f"{tmp_path}/my out/{name}" for name in names]
    for words, folder in zip(analyze, folders, strict=True):
        assert words == [folder, "--num-images", "16", "--function-level", "--output-dir", folder, "--device", "cpu"]
    assert not (tmp_path / "my out").exists()


@pytest.mark.parametrize("tasks", [1, 3, 5, 9])
@pytest.mark.parametrize("is_slurms", [False, True])
def test_tasks_divide_the_runs(tasks, is_slurms, tmp_path, dry_run, monkeypatch):
    path = write_study(tmp_path, seeds=[0, 1, 2])
    every = dry_run(path, tmp_path / "out")
    found = []
    for task in range(tasks):
        if is_slurms:
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(tasks))
        own = dry_run(path, tmp_path / "out", *([] if is_slurms else ["--task", task, "--tasks", tasks]))
        assert own == every[task::tasks]
        found += own
    assert sorted(found) == sorted(every)


def test_task_numbers_of_the_user_override_slurms(tmp_path, dry_run, monkeypatch):
    """To repeat only tasks 3 and 4 of an array of 6."""
    path = write_study(tmp_path, seeds=[0, 1, 2])
    every = dry_run(path, tmp_path / "out")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    assert dry_run(path, tmp_path / "out", "--tasks", 6) == [every[4]]


@pytest.mark.parametrize(
    ("task", "tasks"), [("7", "2"), ("2", "2"), ("0", "0"), ("-1", "2"), ("first", "2"), ("0", "x")]
)
def test_a_task_that_would_miss_runs_is_refused(task, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", tasks)
    with pytest.raises(SystemExit, match=f"error: there is no task {task} of {tasks}"):
        study.main([str(write_study(tmp_path)), str(tmp_path / "out"), "--dry-run"])


def test_torchrun_starts_several_processes_and_threads_are_shared(tmp_path, capsys, monkeypatch):
    def printed(*words):
        study.main([str(write_study(tmp_path)), str(tmp_path / "out"), "--rows", "plain", *words, "--dry-run"])
        return shlex.split(capsys.readouterr().out)

    assert "OMP_NUM_THREADS=1" in printed() and "torch.distributed.run" not in printed()
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert "OMP_NUM_THREADS=6" in printed()
    assert "OMP_NUM_THREADS=3" in printed("--jobs", "2")
    assert "OMP_NUM_THREADS=1" in printed("--jobs", "8")
    words = printed("--nproc-per-node", "3")
    run = words.index("torch.distributed.run")
    assert words[run + 1 : run + 3] == ["--standalone", "--nproc_per_node=3"] and words[run + 3].endswith("/main.py")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "--nproc_per_node=2" in printed("--nproc-per-node", "auto")


SCRIPTS = {"ablate_deit_small.sh": ["/data"], "ablate_cifar.sh": ["/data"], "ablate_digits.sh": []}
"""{script: its arguments before OUT}"""


def copy_with_printing_python(folder):
    """A copy of the scripts whose Python prints its arguments."""
    python = folder / "check out" / ".venv" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    python.chmod(0o755)
    (folder / "check out" / "script").symlink_to(REPOSITORY / "script")
    return folder / "check out"


def start(script, *words, folder, **environment):
    environment = {"PATH": "/usr/bin:/bin"} | environment
    return subprocess.run(["bash", script, *words], cwd=folder, env=environment, capture_output=True, text=True)


def words_of_study(script, *words, folder, **environment):
    """The study file that a script gives to study.py, and the other words."""
    program, file, *rest = start(script, *words, folder=folder, **environment).stdout.splitlines()
    assert program == f"{folder}/study.py"
    return file.replace(str(folder), str(REPOSITORY)), rest


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts_its_study(script, tmp_path, dry_run):
    folder = copy_with_printing_python(tmp_path)
    file, words = words_of_study(f"script/{script}", *SCRIPTS[script], "my out", "--seeds", "1", "2", folder=folder)
    args = [arguments.parse_args(printed) for printed in dry_run(file, *words)]
    assert [of_run.output_dir for of_run in args] == [f"my out/{row}/seed{seed}" for seed in (1, 2) for row in PAPER]
    assert {of_run.data_path for of_run in args} == {*(SCRIPTS[script] or [arguments.defaults()["data_path"]])}
    result = start(f"script/{script}", *SCRIPTS[script], folder=folder)
    assert result.returncode != 0 and "usage: " in result.stderr and result.stdout == ""


def test_the_sbatch_file_runs_the_imagenet_ablation(tmp_path, dry_run, monkeypatch):
    folder = copy_with_printing_python(tmp_path)
    spooled = tmp_path / "slurm_script"
    spooled.write_text((REPOSITORY / "script" / "slurm_ablate.sbatch").read_text())
    user = {"SLURM_SUBMIT_DIR": str(folder), "DATA": "/image net", "OUT": "out"}
    file, words = words_of_study(spooled, "--epochs", "9", "--seeds", "0", "4", folder=folder, **user)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "13")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "24")
    (printed,) = dry_run(file, *words)
    args = arguments.parse_args(printed)
    assert (args.output_dir, args.data_path, args.seed, args.epochs) == ("out/only_mixing/seed4", "/image net", 4, 9)
    (array,) = re.findall(r"^#SBATCH --array=0-(\d+)$", spooled.read_text(), flags=re.MULTILINE)
    assert int(array) == len(PAPER) - 1
    result = start(spooled, folder=tmp_path, SLURM_SUBMIT_DIR=str(folder), DATA="/data")
    assert result.returncode != 0 and "OUT" in result.stderr and result.stdout == ""
