"""Two gloo ranks on this machine do what one process does."""

import json

import torch
from ranks import run_ranks


def test_two_ranks_take_the_steps_of_one_process_with_all_terms(tmp_path):
    for count, name in ((1, "one"), (2, "two")):
        result = run_ranks(count, "tests/ddp_steps.py", tmp_path / f"{name}.pth")
        assert result.returncode == 0, result.stderr
    weights = [torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_both_ranks_evaluate_with_the_running_statistics_of_the_main_process(tmp_path):
    result = run_ranks(2, "tests/ddp_statistics.py", tmp_path)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two and one[0] == [[1] * 3, [2] * 3]


def test_main_skips_a_step_on_both_ranks_and_names_the_rank(tmp_path):
    # The learning rate makes the loss overflow; both ranks must agree on every skipped step to finish.
    model = "--model deit_tiny_patch16_224_diverse --input-size 32 --patch-size 8 --model-kwargs depth=1 embed_dim=24"
    data = "--data-set FAKE --num-classes 4 --num-workers 0 --batch-size 64 --epochs 1 --aa none --no-repeated-aug"
    steps = "--emb_cos_within_coef 1 --opt sgd --lr 1e30 --unscale-lr --warmup-epochs 0 --max-nonfinite-steps 99"
    result = run_ranks(2, "main.py", *f"{model} {data} {steps}".split(), "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    skipped = [line for line in result.stdout.splitlines() if "step skipped" in line]
    assert any("rank 0" in line for line in skipped)
    assert any("rank 1" in line for line in skipped)
    lines = (tmp_path / "run" / "skipped_steps.txt").read_text().splitlines()
    assert len(lines) == len(skipped) == sum("; images number " in line for line in lines)
    assert {line.partition(": ")[0] for line in lines} == {line.partition(": ")[0] for line in skipped}


def test_an_error_of_the_main_process_ends_all_with_the_same_line(tmp_path):
    (tmp_path / "file").write_text("")
    flags = "--data-set DIGITS --model deit_tiny_patch16_224 --input-size 32 --patch-size 8 --model-kwargs depth=1"
    result = run_ranks(2, "main.py", *flags.split(), "--output_dir", tmp_path / "file" / "run")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: --output-dir")]
    assert len(lines) == 2
    assert "Connection closed" not in result.stderr
