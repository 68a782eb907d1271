import pytest

from tenure.data import price_table
from tenure.errors import SpecError
from tenure.resources import Envelope


def test_every_shipped_price_states_its_source_and_date():
    table = price_table()
    for entry in (*table.vectors.values(), *table.machines.values()):
        assert entry.source
        assert entry.date
    assert table.owned.name == "owned"
    assert table.owned.cpu_usd_per_hour > 0


def test_a_function_of_1024_mib_costs_the_listed_gb_second():
    envelope = Envelope(memory_bytes=1 << 30)
    assert price_table().vectors["aws-lambda"].cost_usd(envelope, 1.0, starts=1) == pytest.approx(0.0000166667 + 0.0000002)


def test_the_users_entry_and_default_go_first(tmp_path):
    own = tmp_path / "prices.toml"
    own.write_text(
        'default = "lab"\n[vectors.lab]\ncpu_usd_per_hour = 1\n[machines.big]\ncpus = 4\nmemory = "8GiB"\nusd_per_hour = 2\n'
    )
    table = price_table(own)
    assert table.owned.cost_usd(Envelope(cpus=2), 1800) == 1.0
    assert table.machines["big"].memory_bytes == 8 << 30
    assert "aws-lambda" in table.vectors


def test_a_user_file_that_does_not_exist_adds_nothing(tmp_path):
    assert price_table(tmp_path / "none.toml") == price_table()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[vectors.a]\ncpu_usd = 1", "unknown key vectors.a.cpu_usd; allowed: cpu_usd_per_hour"),
        ("[vectors.a]\ncpu_usd_per_hour = -1", "vectors.a.cpu_usd_per_hour must be a number >= 0"),
        ("[vectors.a]\ncpu_usd_per_hour = nan", "must be a number"),
        ("[vectors.a]\nsource = 3", "must be text"),
        ("[vectors]\na = 3", "must be a table"),
        ("vectors = 3", "must be tables"),
        ("[machines.m]\ncpus = 1", "lacks memory, usd_per_hour"),
        ('[machines.m]\ncpus = 1\nmemory = "x"\nusd_per_hour = 1', "machines.m.memory"),
        ('[machines.m]\ncpus = 1\nmemory = "1GiB"\nusd_per_hour = 1\ngpus = 1.5', "machines.m.gpus"),
        ('default = "nothing"', "default names no price vector"),
        ("default = 3", "default must be the name"),
        ("prices = 1", "unknown key prices"),
        ("a = = 1", "not valid TOML"),
    ],
)
def test_a_wrong_price_file_is_refused_with_file_key_and_what_is_allowed(tmp_path, text, says):
    own = tmp_path / "prices.toml"
    own.write_text(text)
    with pytest.raises(SpecError) as refused:
        price_table(own)
    assert says in str(refused.value)
    assert str(own) in str(refused.value)
