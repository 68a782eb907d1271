"""LitServe over ONNX Runtime with base64 in JSON (lists of numbers are four times slower). PORT THREADS FILE"""

import base64
import sys

import litserve
import numpy as np
import onnxruntime


class Onnx(litserve.LitAPI):
    """One ONNX file."""

    def setup(self, device):
        """Open the session, in the worker process."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(sys.argv[2])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(sys.argv[3], options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]
        self.output = self.session.get_outputs()[0].name

    def decode_request(self, request):
        """Return the rows of one request."""
        return np.frombuffer(base64.b64decode(request["data"]), np.float32).reshape(-1, *self.input.shape[1:])

    def predict(self, x):
        """Run the model."""
        return self.session.run([self.output], {self.input.name: x})[0]

    def encode_response(self, output):
        """Return the answer's bytes as base64."""
        return {"data": base64.b64encode(output.tobytes()).decode()}


if __name__ == "__main__":
    litserve.LitServer(Onnx(), accelerator="cpu").run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning"
    )
