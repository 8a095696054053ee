"""Named choices of terms, coefficients and settings."""

from typing import NamedTuple

from .classification import MIXING
from .regularizers import REGULARIZERS

CORRECTED_STEPS = 10


class Preset(NamedTuple):
    """The arguments of an objective: `DiversityObjective(preset.coefs, **preset.settings)`.

    Attributes:
        doc: what it is, on one line.
        coefs: {term: coefficient}.
        settings: further arguments of `DiversityObjective`; the others keep their defaults.
    """

    doc: str
    coefs: dict[str, float]
    settings: dict[str, object]


_RELEASED = {MIXING: 1.0} | {name: term.coef for name, term in REGULARIZERS.items() if term.coef}
_OFF_DIAGONAL = {"emb_cos_within": "emb_offdiag_cos_within", "attn_cos_within": "attn_offdiag_cos_within"}

PRESETS = {
    "released": Preset("the paper's five terms and coefficients", _RELEASED, {}),
    "diversepatch": Preset(
        "DiversePatch (arXiv 2104.12753): absolute off-diagonal cosine, contrast of raw inner products, mixing",
        {MIXING: 1.0, "emb_offdiag_abscos_within": 1.0, "emb_dot_contrast_cross": 1.0},
        {},
    ),
    "corrected": Preset(
        "the paper's five without their faults: equal mixing, off-diagonal cosines, more power steps; MHS, where it is "
        "added, separates tokens that coincide",
        {_OFF_DIAGONAL.get(name, name): coef for name, coef in _RELEASED.items()},
        {"mixing_balance": "equal", "cond_orth_steps": CORRECTED_STEPS, "mhs_collapse_aware": True},
    ),
}
