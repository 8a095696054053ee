"""The presets: their terms, coefficients and settings."""

import pytest

from diversity import (
    PRESETS,
    DiversityObjective,
)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_an_objective(name):
    preset = PRESETS[name]
    objective = DiversityObjective(preset.coefs, **preset.settings)
    assert objective.coefs == preset.coefs and preset.doc


def test_released_is_the_paper():
    assert PRESETS["released"].settings == {}
    assert PRESETS["released"].coefs == {
        "mixing": 1,
        "emb_cos_within": 0.5,
        "emb_contrast_cross": 0.5,
        "attn_cos_within": 1e-4,
        "weight_mha_cond_orth": 5e-4,
    }


def test_diversepatch_is_its_three_losses_with_weight_1():
    assert PRESETS["diversepatch"].settings == {}
    coefs = {"mixing": 1, "emb_offdiag_abscos_within": 1, "emb_dot_contrast_cross": 1}
    assert PRESETS["diversepatch"].coefs == coefs


def test_corrected_is_released_without_its_faults():
    released, corrected = PRESETS["released"].coefs, PRESETS["corrected"].coefs
    assert corrected == {
        "mixing": released["mixing"],
        "emb_offdiag_cos_within": released["emb_cos_within"],
        "emb_contrast_cross": released["emb_contrast_cross"],
        "attn_offdiag_cos_within": released["attn_cos_within"],
        "weight_mha_cond_orth": released["weight_mha_cond_orth"],
    }
    settings = dict(PRESETS["corrected"].settings)
    assert settings.pop("cond_orth_steps") > 1
    assert settings == {"mixing_balance": "equal", "mhs_collapse_aware": True}
