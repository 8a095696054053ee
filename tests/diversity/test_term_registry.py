"""The registry of terms: docstrings, the table of the docs, and the decorator."""

from unittest import mock

import pytest
import torch
from term_inputs import NAMES

import diversity
from diversity import ALIASES, REGULARIZERS


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_have_returns_source_and_differs(name):
    for heading in ("Returns:", "Source:", "Differs:"):
        assert heading in REGULARIZERS[name].doc


def test_markdown_table_has_a_row_for_each_term():
    rows = diversity.markdown_table().splitlines()
    assert len(rows) == 2 + len(REGULARIZERS)
    for name, row in zip(REGULARIZERS, rows[2:], strict=True):
        assert row.startswith(f"| `--{name}_coef` | {REGULARIZERS[name].level} |")
        assert row.count("|") == rows[0].count("|")
    for alias, name in ALIASES.items():
        assert rows[2 + list(REGULARIZERS).index(name)].endswith(f" Alias: `--{alias}_coef`. |")


def test_decorator_enters_a_function():
    with mock.patch.dict(REGULARIZERS):

        @diversity.regularizer(level="embedding", coef=0.25)
        def emb_of_this_test(first, last, *, power=2):
            """Mean difference.

            More words.
            """
            return (last - first).abs().pow(power).mean()

        term = REGULARIZERS["emb_of_this_test"]
        assert term is emb_of_this_test
        assert (term.name, term.level, term.coef) == ("emb_of_this_test", "embedding", 0.25)
        assert term.reads == ("first", "last")
        assert term.formula == "Mean difference."
        first, last = torch.zeros(1, 2, 3), torch.full((1, 2, 3), 2.0)
        assert term(first=first, last=last) == 4
        assert term(first=first, last=last, power=3) == 8
        assert "`--emb_of_this_test_coef` | embedding | `first`, `last` | 0.25 | Mean" in diversity.markdown_table()
        assert diversity.DiversityObjective({"emb_of_this_test": 1.0}).reads == ["first", "last"]
        with pytest.raises(AssertionError, match="twice"):
            diversity.regularizer(level="embedding")(term.function)
    assert "emb_of_this_test" not in REGULARIZERS


def test_decorator_refuses_an_unknown_level():
    with pytest.raises(AssertionError, match="unknown level"):
        diversity.regularizer(level="optimizer")
