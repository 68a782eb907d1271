"""The python-backend model of Triton: ONNX Runtime behind its C++ core. SITE and THREADS are filled in by `triton.py`."""

import os
import sys

sys.path.insert(0, "@SITE@")  # the embedded interpreter is isolated and does not read PYTHONPATH
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance: requests that the core has joined are run as one batch."""

    def initialize(self, args):
        """Load the ONNX file beside this one."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int("@THREADS@")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.outputs = [output.name for output in self.session.get_outputs()]

    def execute(self, requests):
        """Run one batch, and give each request its rows."""
        rows = [pb_utils.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests]
        whole = rows[0] if len(rows) == 1 else np.concatenate(rows)
        found = self.session.run(self.outputs, {self.input: whole})
        ends = np.cumsum([len(part) for part in rows])[:-1]
        parts = [[all_rows] if len(rows) == 1 else np.split(all_rows, ends) for all_rows in found]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, part[place]) for name, part in zip(self.outputs, parts, strict=True)]
            )
            for place in range(len(rows))
        ]
