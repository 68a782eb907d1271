"""Options of a model from its folder: model.toml, and a Triton repository's config.pbtxt unchanged."""

import pytest

from tenure.errors import SpecError
from tenure.serve import v2
from tenure.serve.options import read_options
from tenure.serve.plane import ModelOptions

needs_config = pytest.mark.skipif(not hasattr(v2, "ModelConfigResponse"), reason="the model configuration is not generated")


def test_a_folder_that_says_nothing_keeps_the_default(tmp_path):
    default = ModelOptions(instances=3)
    assert read_options(tmp_path, default) == default
    assert read_options(tmp_path) == ModelOptions()


def test_every_option_can_be_said_in_toml_with_units(tmp_path):
    (tmp_path / "model.toml").write_text(
        'max_batch_rows = 16\nmax_delay = "2ms"\ninstances = 2\nthreads = 1\nmax_queue = 9\ntimeout = "1.5s"\n'
        'queue_timeout = "20ms"\npriority_levels = 3\nwarmup = false\ndevice = "cuda"\nprecision = "fp16"\n'
    )
    assert read_options(tmp_path) == ModelOptions(
        max_batch_rows=16, max_delay_s=0.002, instances=2, threads=1, max_queue=9, timeout_s=1.5, queue_timeout_s=0.02,
        priority_levels=3, warmup=False, device="cuda", precision="fp16",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("max_batch = 4", r'unknown key "max_batch"; known are max_batch_rows, max_delay, .*'),
        ("max_delay_s = 1", "unknown key"),
        ('max_delay = "2 parsecs"', "max_delay: a time was expected"),
        ('instances = "2"', "instances takes a whole number; found '2'"),
        ("instances = true", "instances takes a whole number; found True"),
        ("warmup = 1", "warmup takes true or false"),
        ("instances = -1", "instances must be 0 or more"),
        ("max_queue = 0", "max_queue must be at least 1"),
        ("priority_levels = 1000", "at most 32 priority levels"),
        ("threads =", "is not TOML"),
    ],
)
def test_what_is_wrong_in_toml_is_refused_with_the_file_and_the_key(tmp_path, text, complaint):
    (tmp_path / "model.toml").write_text(text)
    with pytest.raises(SpecError, match=rf"model\.toml.*{complaint}"):
        read_options(tmp_path)


@needs_config
def test_a_triton_configuration_is_read_and_toml_has_the_last_word(tmp_path):
    (tmp_path / "config.pbtxt").write_text(
        """
        name: "resnet50" platform: "onnxruntime_onnx" max_batch_size: 32
        input [ { name: "input" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] } ]
        output [ { name: "output" data_type: TYPE_FP32 dims: [ 1000 ] } ]
        instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_CPU } ]
        dynamic_batching {
          preferred_batch_size: [ 8, 16 ] max_queue_delay_microseconds: 500 priority_levels: 2 default_priority_level: 1
          default_queue_policy { default_timeout_microseconds: 250000 max_queue_size: 64 }
        }
        parameters { key: "intra_op_thread_count" value: { string_value: "3" } }
        model_warmup [ { name: "zeros" batch_size: 1 } ]
        """
    )
    notes = []
    assert read_options(tmp_path, ModelOptions(warmup=False), note=notes.append) == ModelOptions(
        max_batch_rows=32, max_delay_s=0.0005, instances=3, threads=3, max_queue=64, queue_timeout_s=0.25, priority_levels=2
    )
    assert "preferred_batch_size" in notes[0]
    assert "default_priority_level" in notes[0]
    (tmp_path / "model.toml").write_text("max_batch_rows = 4")
    assert read_options(tmp_path, note=notes.append).max_batch_rows == 4


@needs_config
def test_a_triton_model_without_batching_is_run_row_by_row_and_keeps_the_other_defaults(tmp_path):
    (tmp_path / "config.pbtxt").write_text('backend: "onnxruntime"')
    notes = []
    assert read_options(tmp_path, note=notes.append) == ModelOptions(max_batch_rows=1)
    assert notes == []


@needs_config
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('backend: "python"', r'no engine for "python"; files served are model\.onnx, .*model\.tflite'),
        ('platform: "tensorrt_plan"', 'no engine for "tensorrt_plan"'),
        ('platform: "ensemble" ensemble_scheduling { }', "ensembles are not served"),
        ("sequence_batching { }", "sequence batching is not served"),
        ("model_transaction_policy { decoupled: true }", "decoupled"),
        ('default_model_filename: "resnet.onnx"', 'default_model_filename is "resnet.onnx"'),
        ("max_batch_size: many", "not a Triton model configuration"),
        ("no_such_field: 1", "not a Triton model configuration"),
        ("max_batch_size: -3", "max_batch_rows must be 0 or more"),
        (
            'parameters { key: "intra_op_thread_count" value: { string_value: "all" } }',
            "intra_op_thread_count: invalid literal",
        ),
    ],
)
def test_a_triton_model_that_cannot_be_served_is_refused(tmp_path, text, complaint):
    (tmp_path / "config.pbtxt").write_text(text)
    with pytest.raises(SpecError, match=rf"config\.pbtxt.*{complaint}"):
        read_options(tmp_path)


def test_a_file_too_large_to_be_options_is_refused(tmp_path):
    (tmp_path / "model.toml").write_text("#" * (1 << 20) + "\n")
    with pytest.raises(SpecError, match="at most 1048576"):
        read_options(tmp_path)
