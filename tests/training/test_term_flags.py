"""--preset, and the flags of terms and of their options."""

from unittest import mock

import pytest
import yaml
from flag_files import config, error_of

from diversity import ALIASES, PRESETS, REGULARIZERS, DiversityObjective, Preset, regularizer
from training.arguments import coefficients, parse_args, term_options
from training.build import objective_settings


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_coefficients_and_settings(name):
    args = parse_args(["--preset", name])
    assert coefficients(args) == dict.fromkeys(("mixing", *REGULARIZERS), 0.0) | PRESETS[name].coefs
    default = parse_args([])
    for setting in ("mixing_balance", "mixing_where", "cond_orth_steps", "cond_orth_exact", "mhs_collapse_aware"):
        assert getattr(args, setting) == PRESETS[name].settings.get(setting, getattr(default, setting))


def test_a_preset_may_set_where_patches_are_mixed():
    with mock.patch.dict(PRESETS, {"cut": Preset("for this test", {"mixing": 1.0}, {"mixing_where": "cutmix"})}):
        for words, where in (([], "cutmix"), (["--mixing-where", "always"], "always")):
            settings = objective_settings(parse_args(["--preset", "cut", *words]))
            assert DiversityObjective(**settings).classification.mixing_where == where


def test_explicit_flags_override_a_preset_wherever_they_stand(tmp_path):
    words = ["--emb_cos_within_coef", "0", "--preset", "released", "--mixing-coef=0.25"]
    expected = PRESETS["released"].coefs | {"emb_cos_within": 0.0, "mixing": 0.25}
    assert coefficients(parse_args(words)) == dict.fromkeys(REGULARIZERS, 0.0) | expected
    path = config(tmp_path, "preset: released\nmixing_coef: 0.25\nemb_cos_within_coef: 0\n")
    assert coefficients(parse_args(["--config", path])) == coefficients(parse_args(words))
    assert coefficients(parse_args(["--config", path, "--emb-cos-within-coef", "2"]))["emb_cos_within"] == 2
    assert coefficients(parse_args(["--config", path, "--preset", "diversepatch"]))["emb_dot_contrast_cross"] == 1
    args = parse_args(["--config", path, "--preset", "none"])
    assert coefficients(args) == dict.fromkeys(("mixing", *REGULARIZERS), 0.0) | {"mixing": 0.25}


@pytest.mark.parametrize("first", PRESETS)
@pytest.mark.parametrize("second", [*PRESETS, "none", ""])
def test_a_preset_beside_a_runs_args_yaml_takes_the_place_of_its_preset(tmp_path, first, second):
    words = ["--mixing_coef", "0.25", "--cond-orth-normalize", "--lr", "1e-3"]
    path = config(tmp_path, yaml.safe_dump(vars(parse_args(["--preset", first, *words]))))
    args = parse_args(["--config", path, f"--preset={second}"])
    args.config = None
    assert args == parse_args([f"--preset={second}", *words])


def test_exact_spectra_override_the_power_steps_of_a_preset():
    args = parse_args(["--preset", "corrected", "--cond-orth-exact"])
    options = term_options(args)
    assert (options["cond_orth_exact"], options["cond_orth_steps"]) == (True, 1)


def test_a_new_option_is_a_flag_with_the_help_of_its_docstring(capsys):
    with mock.patch.dict(REGULARIZERS):

        @regularizer(level="embedding")
        def emb_of_this_test(last, *, power=2, scale_of_it=0.5, centred=False):
            """Mean power.

            Args:
                last: [B, P, D].
                power: the exponent, in
                    words.
                scale_of_it: a factor.
                centred: without the mean.
            """

        words = ["--power", "3", "--scale_of_it", "0.25", "--centred"]
        args = parse_args(words)
        assert term_options(args) | {"power": 3, "scale_of_it": 0.25, "centred": True} == term_options(args)
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        assert "the exponent, in words (default: 2)" in capsys.readouterr().out


def test_options_of_every_type_are_read_like_their_defaults(tmp_path, capsys):
    with mock.patch.dict(REGULARIZERS):

        @regularizer(level="embedding")
        def emb_of_this_test(last, *, kind="mean", shape=(1, 2), top=None, offset=0, margin=-0.5):
            """Options without a line in the docstring."""

        defaults = {"kind": "mean", "shape": (1, 2), "top": None, "offset": 0, "margin": -0.5}
        given = {"kind": "none", "shape": (3, 4, 5), "top": 0.5, "offset": -2, "margin": 0.25}
        words = ["--kind", "none", "--shape", "3", "4", "5", "--top", "0.5", "--offset=-2", "--margin", "0.25"]
        for line, expected in (([], defaults), (words, given)):
            args = parse_args(line)
            assert expected.items() <= term_options(args).items()
            path = config(tmp_path, yaml.safe_dump(vars(args), sort_keys=False))
            assert expected.items() <= term_options(parse_args(["--config", path])).items()
        assert parse_args(["--top", "last"]).top == "last"
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        assert "setting of emb_of_this_test (default: mean)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_sets_the_coefficient_of_its_term(alias, name, capsys):
    args = parse_args([f"--{alias}_coef", "0.25"])
    assert coefficients(args) == dict.fromkeys(("mixing", *REGULARIZERS), 0.0) | {name: 0.25}
    assert f"{alias} is another name of {name}" in error_of(capsys, [f"--{alias}_coef", "1", f"--{name}_coef", "1"])


def test_every_option_of_a_term_is_a_flag():
    options = {option for term in REGULARIZERS.values() for option in term.options}
    assert set(term_options(parse_args([]))) == options
    words = ["--cond-orth-steps", "3", "--cond-orth-normalize", "--mhs-collapse-aware"]
    expected = {"cond_orth_steps": 3, "cond_orth_exact": False, "cond_orth_normalize": True, "mhs_collapse_aware": True}
    assert term_options(parse_args(words)) == expected
