"""One table from error to exit code."""

import inspect

import pytest

from tenure import errors
from tenure.cli import exits

ALL_ERRORS = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.TenureError)]


@pytest.mark.parametrize("cls", ALL_ERRORS)
def test_every_error_class_has_a_documented_exit_code(cls):
    error = cls.__new__(cls)
    code = exits.exit_code(error)
    assert code in exits.MEANINGS
    assert code != exits.OK
    if cls is not errors.TenureError and cls is not errors.InternalError:
        assert code != exits.INTERNAL


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.JobFileError("no", source="x.toml", line=3), 2),
        (errors.NoPlacement("no node", {"a": "too small"}), 3),
        (errors.StaleFence("old"), 5),
        (errors.MissingExtra("torch", "torch", "training with torch"), 7),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError(), 70),
    ],
)
def test_a_subclass_has_the_exit_code_of_its_base(error, code):
    assert exits.exit_code(error) == code
