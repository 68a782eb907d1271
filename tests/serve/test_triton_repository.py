"""A repository for Triton: read back by its own message types, by ours, and by the real core where peers are installed."""

import os
import shutil
import subprocess
import sysconfig

import numpy as np
import pytest
from benchmarks.harness import Skip
from benchmarks.peers import homes
from benchmarks.peers.processes import Launch, free_ports, start
from google.protobuf import text_format
from tests.serve.conftest import make_identity

from tenure.cli.main import run
from tenure.errors import Conflict, NotFound, SpecError
from tenure.serve.client import Model
from tenure.serve.options import read_options
from tenure.serve.plane import ModelOptions
from tenure.serve.triton_repository import config_text, write_repository
from tenure.serve.v2 import ModelConfigResponse

HOME = homes.default_root() / "triton"


def config_of(folder, name):
    message = ModelConfigResponse().config
    text_format.Parse((folder / name / "config.pbtxt").read_text(), message)
    return message


def test_an_onnx_model_is_for_tritons_own_backend_with_its_shapes_and_batches(digits, tmp_path):
    made = write_repository(digits.path, tmp_path / "out", options=ModelOptions(max_delay_s=0.002, instances=2, threads=3))
    (model,) = made.models
    assert (model.name, model.backend, model.max_batch_rows) == ("digits", "onnxruntime", 32)
    config = config_of(made.folder, "digits")
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", 32)
    assert [(one.name, list(one.dims)) for one in config.input] == [("x", [16])]
    # The label is one value per row: no dimension for the model, one of length 1 for Triton.
    shapes = {one.name: (list(one.dims), one.HasField("reshape") and list(one.reshape.shape)) for one in config.output}
    assert shapes == {"label": ([1], []), "probability": ([5], False)}
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert not config.dynamic_batching.preferred_batch_size
    assert [(group.count, group.kind) for group in config.instance_group] == [(2, config.instance_group[0].KIND_AUTO)]
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    assert (made.folder / "digits" / "1" / "model.onnx").read_bytes() == digits.path.read_bytes()


def test_what_is_written_is_served_here_too(digits, tmp_path):
    made = write_repository(digits.path, tmp_path / "out", options=ModelOptions(max_batch_rows=16, max_delay_s=0.001))
    options = read_options(made.folder / "digits", note=lambda text: pytest.fail(text))
    assert (options.max_batch_rows, options.max_delay_s, options.instances) == (16, 0.001, 1)


def test_a_model_without_a_batch_dimension_has_no_batches(tmp_path):
    import onnx

    make_identity(tmp_path / "same.onnx", "FLOAT")
    model = onnx.load(tmp_path / "same.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    (tmp_path / "same.onnx").unlink()
    made = write_repository(tmp_path / "fixed.onnx", tmp_path / "out")
    config = config_of(made.folder, "fixed")
    assert config.max_batch_size == made.models[0].max_batch_rows == 0
    assert config.input[0].dims[0] == 1
    assert not config.HasField("dynamic_batching")


def test_versions_and_several_models_of_a_folder_are_kept(digits, tmp_path):
    for version in ("1", "3"):
        (tmp_path / "in" / "digits" / version).mkdir(parents=True)
        shutil.copy(digits.path, tmp_path / "in" / "digits" / version / "model.onnx")
    shutil.copy(digits.path, tmp_path / "in" / "other.onnx")
    made = write_repository(tmp_path / "in", tmp_path / "out")
    assert {model.name: model.versions for model in made.models} == {"digits": ("1", "3"), "other": ("1",)}
    assert (made.folder / "digits" / "3" / "model.onnx").is_file()


def test_weights_beside_an_onnx_file_come_along(digits, tmp_path):
    shutil.copy(digits.path, tmp_path / "digits.onnx")
    (tmp_path / "digits.onnx.data").write_bytes(b"weights")
    made = write_repository(tmp_path / "digits.onnx", tmp_path / "out")
    assert (made.folder / "digits" / "1" / "digits.onnx.data").read_bytes() == b"weights"


def test_nothing_is_overwritten(digits, tmp_path):
    write_repository(digits.path, tmp_path / "out")
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(Conflict, match="exists already"):
        write_repository(digits.path, tmp_path / "out")
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")) == before


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(SpecError, match=r"bad\.onnx"):
        write_repository(tmp_path / "bad.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(NotFound):
        write_repository(tmp_path / "none.onnx", tmp_path / "out")


def test_a_field_that_triton_does_not_have_is_refused():
    with pytest.raises(SpecError, match="no Triton model configuration"):
        config_text({"name": "m", "speed": "high"})


def test_the_script_starts_what_is_there_wherever_the_folder_is_moved_to(digits, tmp_path):
    write_repository(digits.path, tmp_path / "out", http_port=18000, grpc_port=18001)
    moved = (tmp_path / "out").rename(tmp_path / 'an "odd" place')
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("docker", "tritonserver"):
        (tools / name).write_text('#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@"\n')
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"

    def told(**environment):
        return subprocess.run(
            [moved / "run.sh"], env={"PATH": path, **environment}, capture_output=True, text=True, check=True, timeout=20
        ).stdout.splitlines()

    assert told() == [*("tritonserver", "--model-repository", str(moved), "--http-port", "18000", "--grpc-port", "18001")]
    container = told(TRITON_IMAGE="registry/tritonserver:1")
    assert container[:4] == ["docker", "run", "--rm", "--gpus"]
    assert [f"{moved}:/models", "registry/tritonserver:1", "tritonserver", "--model-repository", "/models"] == container[-5:]


def test_the_command_says_what_was_written_and_how_to_go_on(digits, tmp_path, capsys):
    assert run(["serve", str(digits.path), "--with", "triton", "--out", str(tmp_path / "out"), "--max-batch-rows", "8"]) == 0
    said = capsys.readouterr().out
    assert "backend onnxruntime, batches up to 8" in said
    assert "docker run" in said
    assert "--against grpc://HOST:8001" in said


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--with", "triton"], "needs --out DIR"),
        (["--out", "x"], "found nothing"),
        (["--with", "torchserve", "--out", "x"], "found 'torchserve'"),
        (["--with", "triton", "--out", "x", "--cpus", "2"], "--cpus is for a server of ours"),
    ],
)
def test_wrong_use_of_with_is_told(digits, more, reason, capsys):
    assert run(["serve", str(digits.path), *more]) == 2
    assert reason in capsys.readouterr().err


# --- the real core ---


def real_triton(repository, folder):
    """Start the core of the peers with a repository; its wheel has the python backend only."""
    if not homes.made(HOME.parent, HOME.name):
        pytest.skip(f"triton is not below {HOME.parent}: make peers")
    site = homes.site_packages(HOME)
    http, grpc = free_ports(2)
    libraries = [
        str(site / "nvidia_pytriton.libs"),
        sysconfig.get_config_var("LIBDIR") or "",
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    return start(
        "triton",
        Launch(
            argv=(
                str(site / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
                *("--model-repository", str(repository), "--backend-directory", str(HOME / "backends")),
                *(
                    "--http-address",
                    "127.0.0.1",
                    "--http-port",
                    str(http),
                    "--grpc-address",
                    "127.0.0.1",
                    "--grpc-port",
                    str(grpc),
                ),
                *("--allow-metrics", "false", "--exit-timeout-secs", "5"),
            ),
            # The stub takes its libraries from the first Python on the PATH; with NumPy 2 it sends empty outputs.
            env={
                "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
                "PATH": f"{HOME / 'venv' / 'bin'}:{os.environ['PATH']}",
            },
            addresses={"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"},
        ),
        folder,
    )


def importable(folder):
    """Make a folder from which the stub's interpreter imports this package and the libraries of the peers' home."""
    site = homes.site_packages(HOME)
    folder.mkdir()
    for entry in site.iterdir():
        (folder / entry.name).symlink_to(entry)
    import tenure

    (folder / "tenure").symlink_to(os.path.dirname(tenure.__file__))
    return folder


@pytest.mark.real
def test_the_real_triton_serves_the_repository_by_its_python_backend(digits, tmp_path):
    if not homes.made(HOME.parent, HOME.name):
        pytest.skip(f"triton is not below {HOME.parent}: make peers")
    made = write_repository(
        digits.path,
        tmp_path / "out",
        options=ModelOptions(max_batch_rows=16, max_delay_s=0.001),
        python=True,
        python_path=str(importable(tmp_path / "site")),
    )
    with Model(str(digits.path)) as alone:
        wanted = alone.predict(digits.x[:16])
    with real_triton(made.folder, tmp_path) as served:
        for door in ("http", "grpc"):
            with Model(f"{door}://{served.addresses[door]}", "digits", shm=False) as model:
                found = model.predict(digits.x[:16])
            assert np.allclose(found["probability"], wanted["probability"], atol=1e-6)
            assert np.array_equal(found["label"].reshape(-1), wanted["label"])


@pytest.mark.real
def test_the_real_triton_takes_the_onnx_configuration_as_far_as_it_has_the_backend(digits, tmp_path):
    """The core reads and checks config.pbtxt before it looks for the backend, which the peers' wheel does not have."""
    made = write_repository(digits.path, tmp_path / "out", options=ModelOptions(max_delay_s=0.001))
    with pytest.raises(Skip):
        real_triton(made.folder, tmp_path)
    log = (tmp_path / "triton.log").read_text()
    assert "unable to find backend library for backend 'onnxruntime'" in log
    assert "Error parsing text-format" not in log
    broken = made.folder / "digits" / "config.pbtxt"
    broken.write_text(broken.read_text() + "speed: 3\n")  # the control: a configuration that is none is told as such
    with pytest.raises(Skip):
        real_triton(made.folder, tmp_path / "again")
    assert "Error parsing text-format" in (tmp_path / "again" / "triton.log").read_text()
