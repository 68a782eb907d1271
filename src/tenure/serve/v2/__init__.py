"""Message classes of the Open Inference Protocol v2, built from `descriptor.py` (generated from `inference.proto`).

They live in a descriptor pool of their own: other v2 libraries (tritonclient) register messages of the same names in
the process-wide pool, and both must work in one process. No generated `_pb2` code, so no protobuf version is tied down.
"""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tenure.serve.v2.descriptor import FILE

_pool = descriptor_pool.DescriptorPool()
_pool.Add(descriptor_pb2.FileDescriptorProto.FromString(FILE))

SERVICE = "inference.GRPCInferenceService"


def _message(name):
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))


METHODS = {
    method.name: (_message(method.input_type.name), _message(method.output_type.name))
    for method in _pool.FindServiceByName(SERVICE).methods
}
"""Name of each call to the classes of its request and its response."""

ModelInferRequest, ModelInferResponse = METHODS["ModelInfer"]
ModelMetadataRequest, ModelMetadataResponse = METHODS["ModelMetadata"]
ModelReadyRequest, ModelReadyResponse = METHODS["ModelReady"]
ServerLiveRequest, ServerLiveResponse = METHODS["ServerLive"]
ServerMetadataRequest, ServerMetadataResponse = METHODS["ServerMetadata"]
ServerReadyRequest, ServerReadyResponse = METHODS["ServerReady"]
