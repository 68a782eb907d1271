import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.errors import JobFileError
from tenure.jobfile import JobFile, format_job_file, parse_job_file
from tenure.jobs import Job, ServeGoal, TrainGoal
from tenure.resources import Envelope
from tenure.sweeps import Search, Sweep

GOOD = """
[run]
name = "digits"

[task]
command = ["python", "prepare.py"]
[task.envelope]
cpus = 0.5
memory = "512MiB"
slot = "1min"
[task.outputs]
digits = "digits"

[train]
program = "p.py:P"
shards = 4
inputs.data = "task:digits"
[train.goal]
accuracy = 0.95
time = "2min"

[serve]
model = "train:model.onnx"
[[serve.goals]]
name = "one"
p99 = "20ms"
[[serve.goals]]
name = "many"
clients = 8
memory = "400MiB"
images_per_s = 100
lease = true
"""


def test_a_job_file_gives_its_stages_in_order_with_units_read():
    parsed = parse_job_file(GOOD)
    assert [job.name for job in parsed.stages] == ["task", "train", "serve"]
    task, train, serve = parsed.stages
    assert task.envelope == Envelope(cpus=0.5, memory_bytes=512 << 20, slot_s=60.0)
    assert train.train_goal == TrainGoal(accuracy=0.95, time_s=120.0)
    assert serve.serve_goals[0].p99_s == 0.02
    assert serve.serve_goals[1] == ServeGoal(name="many", clients=8, memory_bytes=400 << 20, images_per_s=100.0, lease=True)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("cpus = 0.5", "cpu = 0.5", 8, "unknown key 'cpu' in [task.envelope]; valid keys: cpus, disk, gpu_memory"),
        ("cpus = 0.5", "cpus = -1", 8, "envelope.cpus must be a finite number >= 0; found -1"),
        ('memory = "512MiB"', 'memory = "512 apples"', 9, "a size was expected, such as 512MiB; found '512 apples'"),
        ('memory = "512MiB"', "memory = true", 9, "a size was expected"),
        ('slot = "1min"', 'slot = "1 fortnight"', 10, "a time was expected"),
        ("shards = 4", 'shards = "4"', 16, "shards must be a whole number; found '4'"),
        ("shards = 4", "shards = 0", 16, "shards must lie between 1 and 4096; found 0"),
        ("shards = 4", "evaluate_every = 0", 16, "evaluate_every must lie between 1 and 1,000,000 rounds; found 0"),
        ('inputs.data = "task:digits"', 'inputs.data = "tusk:digits"', 17, "names no earlier stage; earlier stages: task"),
        ("accuracy = 0.95", "accuracy = 95", 19, "goal.accuracy must lie above 0 and at most 1; found 95"),
        ("accuracy = 0.95", "", 18, "[train.goal] needs accuracy"),
        ("images_per_s = 100", "images = 100", 31, "unknown key 'images'"),
        ("clients = 8", "clients = 0", 29, "goal.clients must be at least 1"),
        ('name = "digits"', 'name = "Digits!"', 3, "run name 'Digits!' is not allowed"),
        ('name = "digits"', "name = 7", 3, "name must be a text; found 7"),
        ("shards = 4", 'outputs = { a = "a" }', 16, "unknown key 'outputs' in [train]"),
        ("[run]", "[ran]", 2, "unknown key 'ran'"),
        ('program = "p.py:P"', "", 14, "a train stage needs 'program'"),
        ('command = ["python", "prepare.py"]', 'command = "python x"', 6, "command must be a list of texts"),
        ("shards = 4", "shards = ", 16, "not valid TOML"),
        ("shards = 4", "local_steps = 50", 16, "local_steps must be left out with same_result = true"),
        ("shards = 4", 'codec = "int8"', 16, "Set same_result = false to have fewer bytes instead"),
        ("shards = 4", 'codec = "int4"', 16, 'codec must be "none", "int8" or "topk:SHARE"'),
        ("shards = 4", 'exchange = "ring"', 16, "exchange must be one of sharded, central; found 'ring'"),
        ("shards = 4", "same_result = 0", 16, "same_result must be true or false; found 0"),
        ("shards = 4", "local_steps = -1", 16, "local_steps must lie between 0"),
        ("shards = 4", "outer_momentum = 1", 16, "outer_momentum must be at least 0 and below 1"),
    ],
)
def test_a_wrong_job_file_is_refused_with_line_key_value_and_what_is_allowed(old, new, line, says):
    assert old in GOOD
    with pytest.raises(JobFileError) as refused:
        parse_job_file(GOOD.replace(old, new), source="d.toml")
    assert says in str(refused.value)
    assert str(refused.value).startswith(f"d.toml:{line}: ")


def test_two_stages_of_one_kind_need_names():
    twice = '[[task]]\ncommand = ["a"]\n[[task]]\ncommand = ["b"]\n'
    with pytest.raises(JobFileError, match="two stages are called 'task'"):
        parse_job_file(twice)
    assert [j.name for j in parse_job_file(twice.replace('["b"]', '["b"]\nname = "b"')).stages] == ["task", "b"]


def test_an_empty_job_file_says_what_a_stage_is():
    with pytest.raises(JobFileError, match=r"no stage: write at least one of \[workspace\]"):
        parse_job_file("")


_texts = st.text(max_size=20)
_names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,10}", fullmatch=True)
_envelopes = st.builds(
    Envelope,
    cpus=st.floats(0.01, 512),
    memory_bytes=st.integers(1 << 20, 1 << 45),
    disk_bytes=st.integers(0, 1 << 45),
    gpus=st.sampled_from([0.0, 0.25, 1.0, 4.0]),
    slot_s=st.floats(0.001, 1000),
    total_s=st.floats(1000, 1e6),
)
_jobs = st.one_of(
    st.builds(
        Job,
        kind=st.just("task"),
        name=_names,
        command=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=3).map(tuple),
        envelope=_envelopes,
        env=st.dictionaries(_texts, _texts, max_size=3),
        ports=st.dictionaries(_texts, st.integers(0, 65535), max_size=2),
    ),
    st.builds(
        Job,
        kind=st.just("train"),
        name=_names,
        program=st.text(min_size=1, max_size=9),
        train_goal=st.builds(TrainGoal, accuracy=st.floats(0.01, 1), time_s=st.floats(0, 1e6), cost_usd=st.just(0.0)),
        options=st.dictionaries(_texts, st.one_of(_texts, st.booleans(), st.integers(-9, 9), st.floats(-1, 1)), max_size=3),
        same_result=st.just(False),
        local_steps=st.integers(0, 1000),
        exchange=st.sampled_from(["sharded", "central"]),
        codec=st.sampled_from(["none", "int8", "topk:0.01"]),
        outer_rate=st.floats(0.01, 10),
    ),
    st.builds(
        Job,
        kind=st.just("serve"),
        name=_names,
        model=st.just("m.onnx"),
        serve_goals=st.lists(
            st.builds(
                ServeGoal, name=_texts, clients=st.integers(1, 99), memory_bytes=st.integers(0, 1 << 40), lease=st.booleans()
            ),
            min_size=1,
            max_size=3,
        ).map(tuple),
    ),
)


@given(st.lists(_jobs, min_size=1, max_size=4, unique_by=lambda job: job.name))
def test_parsing_a_printed_job_file_gives_the_same_jobs(jobs):
    jobs.sort(key=lambda job: job.kind)  # TOML keeps stages of one kind together
    job_file = JobFile(name="n", tenant="t", stages=tuple(jobs))
    assert parse_job_file(format_job_file(job_file)) == job_file


EXPERIMENT = """
[serve]
model = "m.onnx"
inputs = { images = "images" }
[serve.sweep]
batches = [1, 8]
transports = ["http", "grpc"]
cell = "300ms"
"""


def test_an_experiment_is_a_table_of_its_serving_stage():
    parsed = parse_job_file(EXPERIMENT)
    assert parsed.stages[0].sweep == Sweep(batches=(1, 8), transports=("http", "grpc"), cell_s=0.3)
    assert parse_job_file(format_job_file(parsed)) == parsed


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('batches = [1, "x"]', "batches must be a list of whole numbers"),
        ("batches = 3", "batches must be a list of whole numbers"),
        ("data = [true]", "data must be a list of texts"),
        ('transports = ["x"]', "one or more of http, grpc, shm"),
        ("speed = 1", "unknown key 'speed'"),
    ],
)
def test_a_wrong_level_of_an_experiment_is_refused_with_its_line(line, says):
    text = EXPERIMENT.replace("[serve.sweep]\n", f"[serve.sweep]\n{line}\n").replace("batches = [1, 8]\n", "")
    with pytest.raises(JobFileError, match=says) as refused:
        parse_job_file(text.replace('transports = ["http", "grpc"]\n', ""))
    assert refused.value.line == 6


def test_a_serving_stage_is_served_or_an_experiment_or_searched():
    with pytest.raises(JobFileError, match="one of them; found envelope and sweep"):
        parse_job_file(EXPERIMENT.replace("inputs =", "envelope = { cpus = 1 }\ninputs ="))
    with pytest.raises(JobFileError, match="one of them; found sweep and search"):
        parse_job_file(EXPERIMENT + "\n[serve.search]\n")


SEARCH = """
[serve]
model = "m.onnx"
[serve.search]
instances = [1, 2]
max_delays = ["0ms", "2.5ms"]
max = "3min"
"""


def test_a_search_is_a_table_of_its_serving_stage_and_needs_no_goal():
    parsed = parse_job_file(SEARCH)
    assert parsed.stages[0].search == Search(instances=(1, 2), max_delays_s=(0.0, 0.0025), max_s=180.0)
    assert parse_job_file(format_job_file(parsed)) == parsed


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('max_delays = "3ms"', "max_delays must be a list of times"),
        ('max_delays = ["soon"]', "soon"),
        ('max_delays = ["11s"]', "search.max_delays must be different times from 0 to 10 s"),
        ("instances = [0]", "search.instances must be different numbers from 1 to 64"),
        ("threads = [1, 1]", "search.threads must be different numbers"),
        ('architectures = ["distributed"]', "one or more of simple, microservice"),
        ('best = "beauty"', "search.best must be one of rate, cost"),
        ("trials = 0", "search.trials must lie between"),
        ("images = 0", "search.images must lie between"),
    ],
)
def test_a_wrong_level_of_a_search_is_refused_with_its_line(line, says):
    with pytest.raises(JobFileError, match=says) as refused:
        parse_job_file(f'[serve]\nmodel = "m.onnx"\n[serve.search]\n{line}\n')
    assert refused.value.line == 4


@given(st.text(max_size=200))
def test_any_text_is_either_a_job_file_or_a_clear_refusal(text):
    with contextlib.suppress(JobFileError):
        assert parse_job_file(text).stages


@pytest.mark.parametrize(
    ("line", "size_bytes"), [("", 10 << 30), ('disk = "1.5GiB"', 3 << 29), ("disk = 0", 0), ('disk = "0B"', 0)]
)
def test_what_a_run_may_occupy_is_read_with_its_unit_and_has_a_default(line, size_bytes):
    parsed = parse_job_file(f"[run]\n{line}\n[task]\ncommand = ['x']")
    assert parsed.disk_bytes == size_bytes
    assert parse_job_file(format_job_file(parsed)) == parsed


@pytest.mark.parametrize("value", ['"much"', "-1", "true", "1.5"])
def test_a_wrong_size_of_a_run_is_refused_with_its_line(value):
    with pytest.raises(JobFileError, match=r"f\.toml:3: .*size") as caught:
        parse_job_file(f"[run]\nname = 'x'\ndisk = {value}\n[task]\ncommand = ['x']", source="f.toml")
    assert caught.value.key == "run.disk"
