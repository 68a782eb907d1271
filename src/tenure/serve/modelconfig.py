"""A model's configuration in the form of the model configuration extension, which perf_analyzer and others read.

Where `max_batch_size` is above 0, dims leave the batch dimension out, as the extension says; metadata shapes have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tenure.serve.plane import ModelOptions
from tenure.serve.tensors import ModelMetadata, TensorMetadata


def model_config(metadata: ModelMetadata, options: ModelOptions, *, batchable: bool) -> dict[str, Any]:
    """Return the configuration as JSON would hold it."""
    first = 1 if batchable else 0
    kind = "KIND_CPU" if options.device == "cpu" else "KIND_GPU"
    config: dict[str, Any] = {
        "name": metadata.name,
        "platform": metadata.platform,
        "backend": metadata.platform.split("_")[0],
        "version_policy": {"all": {}},
        "max_batch_size": options.max_batch_rows if batchable else 0,
        "input": [{**_tensor(meta, first), "format": "FORMAT_NONE"} for meta in metadata.inputs],
        "output": list(_tensors(metadata.outputs, first)),
        "instance_group": [{"name": metadata.name, "kind": kind, "count": options.instances}],
    }
    if batchable:
        config["dynamic_batching"] = {
            "preferred_batch_size": [options.max_batch_rows],
            "max_queue_delay_microseconds": round(options.max_delay_s * 1e6),
        }
        if options.priority_levels:
            config["dynamic_batching"]["priority_levels"] = options.priority_levels
            config["dynamic_batching"]["default_priority_level"] = (options.priority_levels + 1) // 2
    return config


def _tensors(tensors: Iterable[TensorMetadata], first: int) -> Iterable[dict[str, Any]]:
    return (_tensor(meta, first) for meta in tensors)


def _tensor(meta: TensorMetadata, first: int) -> dict[str, Any]:
    kind = "TYPE_STRING" if meta.datatype == "BYTES" else f"TYPE_{meta.datatype}"
    return {"name": meta.name, "data_type": kind, "dims": list(meta.shape[first:])}
