"""The remedies of a model: which are chosen, with which settings, and applied in the order of their registry."""

from collections.abc import Collection, Mapping

from torch import nn

from diversity import REMEDIES, apply_remedy
from diversity.spelling import did_you_mean

PREFIX = "remedies"
"""The module of a model that has the parameters of its remedies, and so the beginning of their names."""


def settings_of(names: Collection[str], kwargs: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """{remedy: all of its settings} for the chosen remedies, in the order of the registry.

    Args:
        names: of remedies.
        kwargs: settings of the chosen remedies that are not at their defaults; each belongs to one remedy.

    Raises:
        ValueError: an unknown remedy, or a setting that no chosen remedy has.
    """
    for name in names:
        if name not in REMEDIES:
            raise ValueError(f"{name} is unknown{did_you_mean(name, REMEDIES, f'; there are {listed(REMEDIES)}')}")
    owners = {setting: remedy.name for remedy in REMEDIES.values() for setting in remedy.settings}
    for setting, value in kwargs.items():
        if setting not in owners:
            known = [setting for setting, owner in owners.items() if owner in names]
            otherwise = f"; there are {listed(known)}" if known else "; no chosen remedy has settings"
            raise ValueError(f"{setting} is unknown{did_you_mean(setting, owners, otherwise)}")
        if owners[setting] not in names:
            raise ValueError(f"{setting}={value} is a setting of {owners[setting]}; add {owners[setting]} to --remedy")
    return {
        name: {setting: kwargs.get(setting, default) for setting, default in remedy.settings.items()}
        for name, remedy in REMEDIES.items()
        if name in names
    }


def apply_remedies(model: nn.Module, names: Collection[str], kwargs: Mapping[str, object]):
    """Apply the chosen remedies to a stock model.

    Raises:
        ValueError: as `settings_of`; a value that a remedy does not take, or a model that lacks what it needs.
    """
    for name, settings in settings_of(names, kwargs).items():
        try:
            apply_remedy(model, name, **settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"--remedy {name}: {error}") from error


def remedies_of(model: nn.Module) -> list[str]:
    """Names of the remedies that are applied to a model."""
    return [*getattr(model, PREFIX, {})]


def compare_with_file(model: nn.Module, flags: object, weights: Mapping) -> tuple[list[str], list[str]]:
    """Compare a model's remedies with those that the weights of a file were trained with.

    Args:
        flags: of the file's training, if this program wrote the file; otherwise anything.
        weights: of the file, under the names of the model.

    Returns:
        One line for each remedy that the file's training did not have and each setting that was another in it, and the
        names of the tensors of remedies that `weights` does not contain.

    Raises:
        ValueError: the file's training had a remedy that the model does not have.
    """
    flags = flags if isinstance(flags, Mapping) else {}
    trained = {*flags.get("remedy", ()), *(key.split(".")[1] for key in weights if key.startswith(f"{PREFIX}."))}
    own, notes, missing = remedies_of(model), [], []
    if lacking := sorted(trained.difference(own)):
        line = f"was trained with --remedy {' '.join(lacking)}, which the model does not have"
        raise ValueError(f"{line}; give the same --remedy (a teacher has none)")
    for name in own:
        absent = [key for key in model.state_dict() if key.startswith(f"{PREFIX}.{name}.") and key not in weights]
        missing += absent
        if absent:
            notes.append(f"--remedy {name}: its parameters are not in the file and keep their initial values")
        elif flags and name not in trained:
            notes.append(f"--remedy {name}: the weights of the file were trained without it")
        elif flags:
            before = REMEDIES[name].settings | (flags.get("remedy_kwargs") or {})
            notes += [
                f"--remedy-kwargs {setting}={value}: the weights of the file were trained with {before[setting]}"
                for setting, value in model.get_submodule(PREFIX)[name].settings.items()
                if value != before[setting]
            ]
    return notes, missing


def remedy_lines(names: Collection[str], kwargs: Mapping[str, object]) -> list[str]:
    """One line for each chosen remedy, with its settings."""
    return [
        f"remedy {name}" + "".join(f" {setting}={value}" for setting, value in settings.items())
        for name, settings in settings_of(names, kwargs).items()
    ]


def listed(names: Collection[str]) -> str:
    return ", ".join(names)
