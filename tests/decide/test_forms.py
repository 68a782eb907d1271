import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.decide.forms import APART, ISOLATION, ORDER, FormFacts, FormGoal, choose_form, parse_form_goal
from tenure.errors import SpecError
from tenure.forms import Form

MIB = 1 << 20


def facts(form: Form, **known: object) -> FormFacts:
    return FormFacts(form=form, size_bytes=70 * MIB, **known)  # type: ignore[arg-type]


ROOT = facts(Form.ROOT, cold_start_s=0.4, memory_floor_bytes=60 * MIB)
OCI = facts(Form.OCI, cold_start_s=0.9, memory_floor_bytes=61 * MIB)
MICROVM = facts(Form.MICROVM, cold_start_s=6.0, memory_floor_bytes=120 * MIB)
ALL = (MICROVM, OCI, ROOT)


def test_the_one_that_adds_least_is_taken_of_those_that_need_the_same_memory() -> None:
    found = choose_form(ALL, FormGoal(cold_start_s=2.0))
    assert found.form is Form.ROOT
    assert found.thin == ""
    assert [(out.form, out.why) for out in found.ruled_out] == [
        (Form.OCI, "it adds a container"),
        (Form.MICROVM, "its start takes 6.00 s; the bound is 2 s"),
    ]
    assert "root meets cold_start<2s" in found.describe()
    assert "not microvm: its start takes 6.00 s" in found.describe()


def test_less_memory_is_cheaper_whatever_it_adds() -> None:
    slim = facts(Form.OCI, memory_floor_bytes=40 * MIB)
    found = choose_form((ROOT, slim), FormGoal())
    assert found.form is Form.OCI
    assert found.ruled_out[0].why == "it needs more memory, 60.0 MiB"


def test_what_is_wanted_apart_rules_out_what_is_not() -> None:
    found = choose_form(ALL, FormGoal(isolation="container"))
    assert found.form is Form.OCI
    assert "as a process only, and container was asked for" in found.ruled_out[0].why
    assert choose_form(ALL, FormGoal(isolation="microvm")).form is Form.MICROVM
    none = choose_form(ALL, FormGoal(isolation="microvm", cold_start_s=1.0))
    assert none.form is None
    assert len(none.ruled_out) == 3
    assert none.why == "no form meets cold_start<1s, isolation at least microvm"


def test_what_was_never_measured_is_taken_only_where_nothing_meets_the_goal_surely_and_it_is_said() -> None:
    unknown = facts(Form.ROOT)
    found = choose_form((unknown, OCI), FormGoal(cold_start_s=2.0))
    assert found.form is Form.OCI
    assert found.ruled_out[0].why == "its start was never measured here"
    alone = choose_form((unknown, MICROVM), FormGoal(cold_start_s=2.0))
    assert alone.form is Form.ROOT
    assert alone.thin == "its start was never measured here"
    assert "may meet" in alone.why


def test_a_floor_above_the_bound_rules_out_and_a_peak_above_it_only_makes_unsure() -> None:
    goal = FormGoal(memory_bytes=64 * MIB)
    assert choose_form((MICROVM,), goal).form is None
    peaked = facts(Form.ROOT, peak_memory_bytes=200 * MIB)
    found = choose_form((peaked,), goal)
    assert found.form is Form.ROOT
    assert "seen to use 200.0 MiB" in found.thin
    assert choose_form((peaked, OCI), goal).form is Form.OCI


def test_what_does_not_run_here_says_why() -> None:
    found = choose_form((ROOT, facts(Form.OCI, cannot="no engine")), FormGoal(isolation="container"))
    assert found.form is None
    assert found.ruled_out[1].why == "no engine"


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("", FormGoal()),
        ("cold_start<2s", FormGoal(cold_start_s=2.0)),
        (" cold_start <= 250ms , memory<256MiB", FormGoal(cold_start_s=0.25, memory_bytes=256 * MIB)),
    ],
)
def test_a_goal_reads_as_people_write_it(text: str, goal: FormGoal) -> None:
    assert parse_form_goal(text) == goal


@pytest.mark.parametrize(
    "text", ["p99<5ms", "cold_start", "cold_start<", "cold_start<0s", "memory<2s", "memory<1GiB,memory<2GiB"]
)
def test_a_goal_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_form_goal(text)


def some(form: Form) -> st.SearchStrategy[FormFacts]:
    memory = st.none() | st.integers(1, 500).map(lambda mib: mib * MIB)
    return st.builds(
        FormFacts,
        form=st.just(form),
        size_bytes=st.integers(1, 1 << 30),
        cold_start_s=st.none() | st.floats(0.01, 20.0),
        memory_floor_bytes=memory,
        peak_memory_bytes=memory,
        cannot=st.sampled_from(["", "", "not here"]),
    )


goals = st.builds(
    FormGoal,
    cold_start_s=st.just(0.0) | st.floats(0.01, 20.0),
    memory_bytes=st.integers(0, 500).map(lambda mib: mib * MIB),
    isolation=st.sampled_from(["process", "container", "microvm"]),
)


@given(st.tuples(*map(some, ORDER)), goals, st.permutations(range(3)))
def test_every_choice_keeps_the_goal_and_every_other_form_has_a_reason(known, goal, order) -> None:  # type: ignore[no-untyped-def]
    found = choose_form(known, goal)
    assert found == choose_form([known[at] for at in order], goal), "in whatever order they come"
    assert {out.form for out in found.ruled_out} == {each.form for each in known} - {found.form}
    assert all(out.why for out in found.ruled_out)
    best = next((each for each in known if each.form is found.form), None)
    if best is None:
        assert not any(_meets(each, goal, sure=True) for each in known)
        return
    assert _meets(best, goal, sure=not found.thin)
    rivals = [each for each in known if _meets(each, goal, sure=True)]
    if rivals:
        assert not found.thin
        if all(each.memory_bytes is not None for each in rivals):
            assert best.memory_bytes <= min(each.memory_bytes for each in rivals) * (1 + APART)


def _meets(each: FormFacts, goal: FormGoal, *, sure: bool) -> bool:
    levels = list(ISOLATION.values())
    if each.cannot or levels.index(ISOLATION[each.form]) < levels.index(goal.isolation):
        return False
    start = each.cold_start_s if each.cold_start_s is not None else (float("inf") if sure else 0.0)
    memory = each.memory_bytes if sure else each.memory_floor_bytes
    need = memory if memory is not None else (float("inf") if sure else 0)
    return (not goal.cold_start_s or start <= goal.cold_start_s) and (not goal.memory_bytes or need <= goal.memory_bytes)
