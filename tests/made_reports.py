"""Numbers of the form that measure_redundancy and measure_function return, for tests of figures and pages."""

import numpy as np

from diversity.measures import measures_of
from reports.function_figures import BARS, CURVES

MATRICES = ["q", "k", "v", "proj", "fc1", "fc2"]
CIRCUITS = ["qk", "ov"]


def make_report(seed, stages=(0,), depth=4, width=6):
    """Numbers of the form that `measure_redundancy` returns; a stage is twice as wide as the one before."""
    generator = np.random.default_rng(seed)
    widths = [width * 2 ** (sum(block >= first for first in stages) - 1) for block in range(depth)]
    return {
        "stages": list(stages),
        "embedding": {key: list(generator.random(depth + 1)) for key in measures_of("embedding")},
        "attention": {key: list(generator.random(depth)) for key in measures_of("attention")},
        "mlp": {key: list(generator.random(depth)) for key in measures_of("mlp")},
        "weight": {m: {key: list(generator.random(depth) + 1) for key in measures_of("weight")} for m in MATRICES},
        "circuit": {c: {key: list(generator.random(depth)) for key in measures_of("circuit")} for c in CIRCUITS},
        "circuit_spectra": {c: [sorted(generator.random(3), reverse=True) for _ in widths] for c in CIRCUITS},
        "cka": generator.random((depth + 1, depth + 1)).tolist(),
        "variance": [list(generator.dirichlet(np.ones(width))) for width in [widths[0], *widths]],
        "spectra": {m: [sorted(generator.random(n) + 0.1, reverse=True) for n in widths] for m in MATRICES},
    }


FRACTIONS = {"heads": 11, "tokens": 10}


def make_function(seed, depth=4):
    """The part of a report that is of the function level."""
    generator = np.random.default_rng(seed)

    def curve(length):
        return [*(100 * generator.random(length))]

    function = {}
    for measure, key in CURVES:
        if measure in FRACTIONS:
            function.setdefault(measure, {"fractions": [i / 10 for i in range(FRACTIONS[measure])]})
        function.setdefault(measure, {})[key] = curve(FRACTIONS.get(measure, depth + (measure != "blocks")))
    for measure in ("knn", "probe"):
        function[measure]["layers"][0] = None
    function["patch_probe"] = dict.fromkeys(BARS, 0) | {"majority": 80.0, "chance": 12.0}
    function["patch_probe"] |= dict(zip(BARS, curve(len(BARS)), strict=True))
    return {"function": function}
