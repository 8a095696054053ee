"""The shell scripts and the README: every command parses, the launchers run, the table and the example hold."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import REPOSITORY, TINY, make_image_folder

import benchmark
import diversity
from training import arguments

README = (REPOSITORY / "README.md").read_text()
LAUNCHERS = {
    "run_deit_tiny_diverse.sh": "deit_tiny_patch16_224_diverse",
    "run_deit_small_diverse.sh": "deit_small_patch16_224_diverse",
    "run_deit_small_24layer_diverse.sh": "deit_small_layer24_patch16_224_diverse",
    "run_deit_base_diverse.sh": "deit_base_patch16_224_diverse",
    "run_deit_small_baseline.sh": "deit_small_patch16_224",
}
PAPER = {
    "mixing": 1, "emb_cos_within": 0.5, "emb_contrast_cross": 0.5, "attn_cos_within": 1e-4, "weight_mha_cond_orth": 5e-4
}  # fmt: skip


def launched(script, *flags, tmp_path, **environment):
    """The command that a launcher would start, from a copy whose Python writes its arguments down."""
    copy = tmp_path / "checkout"
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / "script").symlink_to(REPOSITORY / "script")
    python = copy / ".venv" / "bin" / "python"
    count_gpus = 'if [ "$1" = -c ]; then echo 2; exit; fi'
    python.write_text(f'#!/bin/sh\n{count_gpus}\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    python.chmod(0o755)
    env = {**os.environ, **environment}
    command = ["bash", copy / "script" / script, *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("script", "model"), LAUNCHERS.items())
def test_launchers_start_the_papers_recipe(script, model, tmp_path):
    words = launched(script, "/data", "--seed", "3", "--batch-size", "64", tmp_path=tmp_path).stdout.split("\n")[:-1]
    assert words[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert words[4].endswith("/main.py")
    args = arguments.parse_args(words[5:])
    assert (args.model, args.data_path, args.output_dir) == (model, "/data", f"runs/{model}")
    assert (args.epochs, args.lr, args.seed, args.batch_size) == (300, 5e-4, 3, 64)
    paper = PAPER if model.endswith("_diverse") else {}
    assert arguments.coefficients(args) == {name: paper.get(name, 0) for name in ("mixing", *diversity.REGULARIZERS)}


def test_ngpu_overrides_the_number_of_processes(tmp_path):
    result = launched("run_deit_tiny_diverse.sh", "/data", tmp_path=tmp_path, NGPU="5")
    assert "--nproc_per_node=5" in result.stdout


def test_a_launcher_without_data_says_how_to_call_it(tmp_path):
    result = launched("run_deit_tiny_diverse.sh", tmp_path=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("usage:")


def test_a_launcher_trains_on_the_cpu(tmp_path):
    flags = [*TINY, "--output_dir", tmp_path / "run"]
    result = subprocess.run(
        ["bash", REPOSITORY / "script" / "run_deit_tiny_diverse.sh", "none", *map(str, flags)],
        env={**os.environ, "NGPU": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "run" / "log.txt").read_text())
    assert {f"train_{name}" for name in PAPER} <= record.keys()


def test_the_paper_values_in_the_registry_are_the_launchers():
    wired = {name: term.coef for name, term in diversity.REGULARIZERS.items() if term.coef}
    assert wired == {name: coef for name, coef in PAPER.items() if name != "mixing"}


def test_quickstart_parses():
    text = (REPOSITORY / "script" / "quickstart.sh").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^\.venv/bin/python main\.py (.*)$", text, flags=re.MULTILINE)
    args = arguments.parse_args(shlex.split(command.replace('"$run"', "runs/x").replace('"$@"', "")))
    assert args.data_set == "DIGITS"
    assert all(coef > 0 for name, coef in arguments.coefficients(args).items() if name in PAPER)


def test_every_readme_command_names_a_file_and_flags_that_exist():
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL))
    inline = re.findall(r"`(python \w+\.py[^`]*)`", README)
    commands = [line.split("#")[0].strip() for line in [*shell.splitlines(), *inline]]
    assert len(commands) >= 5
    for command in filter(None, commands):
        words = [word for word in shlex.split(command.replace("\n", " ")) if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "sbatch":
            words = [word for word in words[1:] if not word.startswith("--array")]
        program = words[1] if words[0] == "python" else words[0]
        assert (REPOSITORY / program).is_file(), command
        flags = [word for word in words[2:] if word.startswith("--") and word not in ("--help", "--resume", "--eval")]
        known = arguments.build_parser()._option_string_actions
        own = (REPOSITORY / program).read_text()
        assert all(flag.replace("_", "-") in known or f'"{flag}"' in own for flag in flags), command


SMALL_STEP = (
    *("--model", "deit_tiny_patch16_224", "--model-kwargs", "depth=2", "--device", "cpu"),
    *("--batch-size", "2", "--rounds", "1"),
)


def table(text):
    """{first cell: the others} of the first Markdown table in a text."""
    (first, *_) = re.findall(r"(?:^\|.*\n)+", f"{text}\n", flags=re.MULTILINE)
    _, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_benchmark_compares_steps(capsys, tmp_path):
    benchmark.main(["step", *SMALL_STEP, "--json", str(tmp_path / "step.json")])
    paper = [f"only {name}" for name in ("mixing", *(n for n, term in diversity.REGULARIZERS.items() if term.coef))]
    names = ["plain timm", "diversified", *paper, "textbook"]
    rows = table(capsys.readouterr().out)
    assert [*rows] == names
    assert all(float(cell) > 0 for row in rows.values() for cell in row[:5])
    steps = json.loads((tmp_path / "step.json").read_text())["steps"]
    assert [*steps] == names
    assert steps["plain timm"]["to_plain"] == steps["textbook"]["textbook_to_it"] == 1


def test_the_benchmark_compares_terms(capsys, tmp_path):
    terms = ["mixing", "emb_grad_diversity", "attn_cos_cross", "weight_mha_so"]
    benchmark.main(["terms", *SMALL_STEP, "--json", str(tmp_path / "terms.json"), "--terms", *terms])
    rows = table(capsys.readouterr().out)
    assert [*rows] == [f"`{name}`" for name in terms]
    assert all(float(row[2]) > 0 for row in rows.values())  # each of them needs memory of its own


def test_the_benchmark_compares_loaders(capsys, tmp_path):
    data = make_image_folder(tmp_path / "data", n=24)
    flags = ["--data-set", "IMNET", "--data-path", data, "--resized", data, "--num-workers", "1"]
    own = ["--rounds", "1", "--steps", "2", "--json", tmp_path / "loader.json"]
    benchmark.main(["loader", *map(str, [*TINY, *flags, *own])])
    printed = capsys.readouterr().out
    rows = table(printed)
    parts = ["decode once", "fast crop", "bytes", "all three", "all three, resized copy"]
    assert [*rows] == ["DeiT's", *parts]
    assert all(float(cell) > 0 for row in rows.values() for cell in row)
    assert re.findall("with (no part|every part): [0-9.]+ images/s, [0-9.]+ %", printed) == ["no part", "every part"]


def test_the_readme_table_of_costs_names_every_term():
    rows = [line for line in README.splitlines() if re.match(r"\| `\w+` \| [\d.]+ \| [\d.]+ % \| [\d.]+ \|", line)]
    assert [row.split("`")[1] for row in rows] == ["mixing", *diversity.REGULARIZERS]


def test_the_readme_table_of_terms_is_the_registrys():
    rows = diversity.markdown_table().splitlines()[2:]
    assert all(row in README for row in rows)


def test_the_readme_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(example, names)
    assert names["loss"].isfinite()
    assert "emb_cos_within" in names["terms"]
    assert names["model"].head.weight.grad is not None


def test_the_package_installs_alone(tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "diversity"):
        copy.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", REPOSITORY / name, copy / name], check=True)
    subprocess.run([*command, "--target", tmp_path / "site", copy], check=True, timeout=120)
    code = "import diversity, sys; print(diversity.__file__, 'utils' in sys.modules, 'datasets' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.split() == [str(tmp_path / "site" / "diversity" / "__init__.py"), "False", "False"]
    assert (tmp_path / "site" / "diversity").is_dir()
    assert not (tmp_path / "site" / "models").exists()


def test_the_readme_estimate_follows_from_its_assumptions():
    """300 epochs, 128 images a GPU, 33 % of 989 TFLOP/s, 88.2 MB of gradients, the images/s of the loader's table."""
    loaders = table(README[README.index("| loader") :])
    per_core = [float(loaders[name][0]) for name in ("DeiT's", "all three", "all three, resized copy")]
    rows = table(README[README.index("| GPUs |") :])
    images = 300 * (1_281_167 // 256 * 256)
    per_gpu = 0.33 * 989e12 / 27.5e9
    for gpus, bandwidth in ((1, None), (8, 450e9), (64, 50e9)):
        speed, hours = gpus * per_gpu, images / gpus / per_gpu / 3600
        exchange = 2 * (gpus - 1) / gpus * 88.2e6 / bandwidth if bandwidth else 0
        feeding = [f"{min(gpus, 8) * per_gpu / rate:.0f}" for rate in per_core]
        expected = [
            f"{speed:,.0f}", f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min",
            f"{128 / per_gpu * 1e3:.1f} ms",
            f"{exchange * 1e3:.1f} ms" if exchange else "none", ", ".join(feeding),
        ]  # fmt: skip
        assert rows[str(gpus)] == expected
