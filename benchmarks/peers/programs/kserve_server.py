"""KServe's Python server over ONNX Runtime, as its documentation has a custom model.

Arguments: HTTP_PORT GRPC_PORT THREADS QUIET(0|1) NAME=FILE …
perf_analyzer asks every server for a model's configuration first, which KServe does not have: that one method is added, with
an empty configuration as its answer. It is called once per measurement; inference goes KServe's own way.
"""

import logging
import sys

import grpc
import kserve
import onnxruntime
from kserve import InferOutput, InferResponse
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service

_EMPTY_CONFIG = bytes((10, 0))
"""ModelConfigResponse with its field `config` set and nothing in it."""


class Onnx(kserve.Model):
    """One ONNX file."""

    def __init__(self, name, path, threads):
        super().__init__(name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.output = self.session.get_outputs()[0].name
        self.ready = True

    def get_input_types(self):
        """Return what it takes, as perf_analyzer wants to know."""
        return [described(tensor) for tensor in self.session.get_inputs()]

    def get_output_types(self):
        """Return what it gives."""
        return [described(tensor) for tensor in self.session.get_outputs()]

    def load(self):
        """Nothing more to load."""
        return True

    def predict(self, payload, headers=None, response_headers=None):
        """Run the model on one request."""
        found = self.session.run([self.output], {self.input: payload.inputs[0].as_numpy()})[0]
        output = InferOutput(name=self.output, shape=list(found.shape), datatype="FP32")
        output.set_data_from_numpy(found, binary_data=True)
        return InferResponse(payload.id, self.name, [output])


def described(tensor):
    """Return a tensor's metadata; all are float32 here."""
    return {"name": tensor.name, "datatype": "FP32", "shape": [n if isinstance(n, int) else -1 for n in tensor.shape]}


def add_config(add):
    """Return KServe's registration of its service, with the method for configurations beside it."""

    async def config(request, context):
        return _EMPTY_CONFIG

    def added(servicer, server):
        add(servicer, server)
        methods = {"ModelConfig": grpc.unary_unary_rpc_method_handler(config)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods),))

    return added


if __name__ == "__main__":
    http_port, grpc_port, threads, quiet, *models = sys.argv[1:]
    service.add_GRPCInferenceServiceServicer_to_server = add_config(service.add_GRPCInferenceServiceServicer_to_server)
    if quiet == "1":
        logging.disable(logging.INFO)
    loaded = [Onnx(name, path, int(threads)) for name, path in (model.split("=", 1) for model in models)]
    kserve.ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1).start(loaded)
