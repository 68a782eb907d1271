import subprocess
import sys

import pytest

import tenure


def test_every_promised_name_is_there_and_is_callable():
    for name in tenure.__all__:
        assert callable(getattr(tenure, name)) or name == "__version__"


def test_a_verb_stays_a_verb_after_the_nouns_were_imported():
    code = (
        "import tenure, tenure.leases, tenure.recommend; assert callable(tenure.list_leases) and callable(tenure.recommend_for)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_the_package_loads_nothing_else():
    code = "import sys, tenure; assert not [m for m in sys.modules if m.startswith(('tenure.', 'numpy', 'msgspec'))]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="list_leases"):
        tenure.nothing  # noqa: B018
