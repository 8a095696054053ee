"""The GPU report as Markdown, as far as it is known."""

from reports.tables import markdown_table

from .loader import ALL, AS_IS
from .steps import DIVERSIFIED

KERNEL_NAME = 90  # most characters of a kernel's name


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
    """The title, what was run, and the state of every part."""
    parts = report["parts"]
    columns = {
        "part": [*parts],
        "state": [part["state"] for part in parts.values()],
        "time, s": [f"{part['seconds']:.0f}" if "seconds" in part else "" for part in parts.values()],
        "note": [part.get("note", "") for part in parts.values()],
    }
    return [
        f"# Benchmark of {parts['card'].get('name') or 'a ' + report['device'].upper()}",
        f"`python benchmark.py {' '.join(report['command'])}`, limit {report['minutes']:g} minutes, "
        f"{report['cores']} CPU cores",
        "\n".join(f"- {line}" for line in report["environment"]),
        markdown_table(columns),
    ]


def card(part: dict) -> list[str]:
    """The device and its two speeds."""
    rows = {}
    if "name" in part:
        rows |= {
            "GPU": part["name"],
            "memory, GiB": f"{part['memory_gib']:.1f}",
            "multiprocessors": f"{part['multiprocessors']}",
            "CUDA version of torch": f"{part['cuda']}",
            "driver version": part["driver"],
        }
    if "copy_bytes_per_second" in part:
        rows["copy within its memory, read + written, GB/s"] = f"{part['copy_bytes_per_second'] / 1e9:,.0f}"
    if "matmul_flops_per_second" in part:
        rate = f"{part['matmul_flops_per_second'] / 1e12:.3g}"
        rows[f"product of large {part['precision']} matrices, TFLOP/s"] = rate
    return ["## Card", markdown_table({"property": [*rows], "value": [*rows.values()]})] if rows else []


def cuda_tests(part: dict) -> list[str]:
    """How many CUDA tests passed, failed and were skipped; what those that did not pass say."""
    tests = part.get("tests")
    if not tests:
        return []
    of_outcome = {
        outcome: [test for test in tests if test["outcome"] == outcome] for outcome in ("passed", "failed", "skipped")
    }
    counts = ", ".join(f"{len(group)} {outcome}" for outcome, group in of_outcome.items())
    slowest = max(tests, key=lambda test: test["seconds"])
    reasons = sorted({line for test in of_outcome["skipped"] for line in test["lines"]})
    blocks = ["## CUDA tests", f"{counts}. The slowest is `{slowest['name']}` with {slowest['seconds']:.0f} s."]
    blocks += [f"- {reason}" for reason in reasons]
    for test in of_outcome["failed"]:
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
            title = (
                f"{table['model']}, batch {table['batch_size']}, {table['flops_per_image'] / 1e9:.3g} GFLOP an image"
            )
            blocks += [f"### {title}", steps_table(table["rows"])]
    return blocks


def steps_table(rows: dict[str, dict]) -> str:
    """One row for each kind of step; one that failed has only a note."""

    def column(name, text):
        return ["" if row.get(name) is None else text(row[name]) for row in rows.values()]

    columns = {
        "step": [*rows],
        "ms": column("ms", "{:.1f}".format),
        "images/s": column("images_per_s", "{:,.0f}".format),
        "to plain": column("to_plain", "{:.3f}".format),
        "peak memory, MiB": column("peak_mib", "{:,.0f}".format),
        "utilisation": column("utilisation", "{:.1%}".format),
        "host waits a step": column("host_syncs", "{:g}".format),
        "first step, s": column("first_step_s", "{:.1f}".format),
        "note": column("error", str),
    }
    return markdown_table({name: texts for name, texts in columns.items() if any(texts)})


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
    """Images per second that are read, beside those of the training step."""
    if "images_per_s_of_a_core" not in part:
        return []
    core = part["images_per_s_of_a_core"]
    rows = {"one core, as DeiT reads": core[AS_IS], "one core, as main.py reads": core[ALL]}
    if "images_per_s_of_all_workers" in part:
        rows[f"all {part['workers']} loader processes"] = part["images_per_s_of_all_workers"]
    blocks = ["## Loader", f"Images of {part['source']}, batch {part['batch_size']}."]
    tables = [table for table in steps.get("tables", []) if "images_per_s" in table["rows"].get(DIVERSIFIED, {})]
    if tables:
        table = tables[0]  # of the most important one that was measured
        speed = table["rows"][DIVERSIFIED]["images_per_s"]
        rows[f"diversified step of {table['model']}, batch {table['batch_size']}"] = speed
        blocks.append(f"The training step needs {speed / core[ALL]:.1f} cores that read for it.")
    table = markdown_table({"what": [*rows], "images/s": [f"{speed:,.0f}" for speed in rows.values()]})
    return [*blocks[:2], table, *blocks[2:]]
