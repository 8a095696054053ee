"""The GPU report as Markdown, with the results so far."""

from reports.tables import markdown_table, rows_table

from .loader import ALL, AS_IS
from .steps import DIVERSIFIED, STEP_COLUMNS

KERNEL_NAME = 90  # most characters of a kernel's name
CARD = {
    "GPU": ("name", str),
    "memory, GiB": ("memory_gib", "{:.1f}".format),
    "multiprocessors": ("multiprocessors", str),
    "CUDA version of torch": ("cuda", str),
    "driver version": ("driver", str),
    "copy within its memory, read + written, GB/s": ("copy_bytes_per_second", lambda rate: f"{rate / 1e9:,.0f}"),
    "product of large {precision} matrices, TFLOP/s": ("matmul_flops_per_second", lambda rate: f"{rate / 1e12:.3g}"),
}


def markdown_report(report: dict) -> str:
    """The text of gpu.md from the content of gpu.json."""
    parts = report["parts"]
    sections = [
        heading(report),
        card(parts["card"]),
        cuda_tests(parts["tests"]),
        steps(parts["steps"]),
        kernels(parts["kernels"], report["device"]),
        loader(parts["loader"], parts["steps"]),
    ]
    return "\n\n".join(block for section in sections for block in section if block) + "\n"


def heading(report: dict) -> list[str]:
    """The title, the command, and the state of every part."""
    parts = report["parts"]
    columns = {"state": ("state", str), "time, s": ("seconds", "{:.0f}".format), "note": ("note", str)}
    return [
        f"# Benchmark of {parts['card'].get('name') or 'a ' + report['device'].upper()}",
        f"`python benchmark.py {' '.join(report['command'])}`, limit {report['minutes']:g} minutes, "
        f"{report['cores']} CPU cores",
        "\n".join(f"- {line}" for line in report["environment"]),
        rows_table("part", parts, columns),
    ]


def card(part: dict) -> list[str]:
    """The device and its two speeds."""
    rows = {
        label.format(precision=part.get("precision")): form(part[key])
        for label, (key, form) in CARD.items()
        if key in part
    }
    return ["## Card", markdown_table({"property": [*rows], "value": [*rows.values()]})] if rows else []


def cuda_tests(part: dict) -> list[str]:
    """The numbers of CUDA tests that passed, failed and were skipped; the messages of those that did not pass."""
    tests = part.get("tests")
    if not tests:
        return []
    by_outcome = {name: [test for test in tests if test["outcome"] == name] for name in ("passed", "failed", "skipped")}
    counts = ", ".join(f"{len(group)} {name}" for name, group in by_outcome.items())
    slowest = max(tests, key=lambda test: test["seconds"])
    blocks = ["## CUDA tests", f"{counts}. The slowest is `{slowest['name']}` with {slowest['seconds']:.0f} s."]
    blocks += [f"- {reason}" for reason in sorted({line for test in by_outcome["skipped"] for line in test["lines"]})]
    for test in by_outcome["failed"]:
        blocks += [f"`{test['name']}` failed:", "\n".join(["```", *test["lines"], "```"])]
    return blocks


def steps(part: dict) -> list[str]:
    """A table of training steps for each model and batch size."""
    if "tables" not in part:
        return []
    blocks = [
        "## Training steps",
        f"Medians of {part['rounds']} rounds, in turns with the plain step. Peak memory is that beyond weights, their "
        "average and the optimizer's state. Utilisation is the speed of the model's matrix products as a fraction of "
        "that of a product of large matrices. The first step is the one that is compiled.",
    ]
    for table in part["tables"]:
        if table["rows"]:
            flops = f"{table['flops_per_image'] / 1e9:.3g} GFLOP an image"
            blocks.append(f"### {table['model']}, batch {table['batch_size']}, {flops}")
            blocks.append(rows_table("step", table["rows"], STEP_COLUMNS))
    return blocks


def kernels(part: dict, device: str) -> list[str]:
    """The kernels that take most of a step."""
    if "kernels" not in part:
        return []
    kind = "kernels" if device == "cuda" else "operators"
    rows = part["kernels"]
    columns = {
        kind: [f"`{row['name'][:KERNEL_NAME]}`" for row in rows],
        "ms a step": [f"{row['ms']:.2f}" for row in rows],
        "of all": [f"{row['fraction']:.1%}" for row in rows],
        "calls a step": [f"{row['calls']:g}" for row in rows],
    }
    where = f"{part['model']}, batch {part['batch_size']}"
    return [
        f"## The {len(rows)} {kind} that take most time of a diversified step",
        f"{where}; all {kind} together take {part['ms_of_all']:.1f} ms a step.",
        markdown_table(columns),
    ]


def loader(part: dict, steps: dict) -> list[str]:
    """Images per second that the loader reads, next to those of the training step."""
    if "images_per_s_of_a_core" not in part:
        return []
    core = part["images_per_s_of_a_core"]
    rows = {"one core, as DeiT reads": core[AS_IS], "one core, as main.py reads": core[ALL]}
    if "images_per_s_of_all_workers" in part:
        rows[f"all {part['workers']} loader processes"] = part["images_per_s_of_all_workers"]
    need = []
    for table in steps.get("tables", []):  # the most important one that was measured comes first
        speed = table["rows"].get(DIVERSIFIED, {}).get("images_per_s")
        if speed and not need:
            rows[f"diversified step of {table['model']}, batch {table['batch_size']}"] = speed
            need.append(f"The training step needs {speed / core[ALL]:.1f} cores that read for it.")
    columns = {"what": [*rows], "images/s": [f"{speed:,.0f}" for speed in rows.values()]}
    return ["## Loader", f"Images of {part['source']}, batch {part['batch_size']}.", markdown_table(columns), *need]
