"""The examples in the docstrings of what other code bases import."""

import doctest
import importlib

import pytest

MODULES = ["stats", "losses", "groups", "vocabulary", "data"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    module = importlib.import_module(f"jaxrl_sd.{name}")
    failed, tried = doctest.testmod(module)
    assert failed == 0 < tried
