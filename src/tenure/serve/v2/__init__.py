"""Message classes of the Open Inference Protocol v2 and its extensions, built from `descriptor.py` (generated).

They live in a descriptor pool of their own: other v2 libraries (tritonclient) register messages of the same names in
the process-wide pool, and both must work in one process. No generated `_pb2` code, so no protobuf version is tied down.
"""

from google.protobuf import descriptor_pool, message_factory

from tenure.serve.v2.descriptor import FILES

_pool = descriptor_pool.DescriptorPool()
for _file in FILES:  # as they are: reading them takes a module that nothing else here needs, 300 kB of byte code
    _pool.AddSerializedFile(_file)

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"


def _classes(service):
    return {
        method.name: tuple(
            message_factory.GetMessageClass(_pool.FindMessageTypeByName(kind.full_name))
            for kind in (method.input_type, method.output_type)
        )
        for method in _pool.FindServiceByName(service).methods
    }


METHODS = _classes(SERVICE)
"""Name of each call to the classes of its request and its response."""
HEALTH_METHODS = _classes(HEALTH)

ModelInferRequest, ModelInferResponse = METHODS["ModelInfer"]
ModelStreamInferResponse = METHODS["ModelStreamInfer"][1]
ModelMetadataRequest, ModelMetadataResponse = METHODS["ModelMetadata"]
ModelReadyRequest, ModelReadyResponse = METHODS["ModelReady"]
ServerLiveRequest, ServerLiveResponse = METHODS["ServerLive"]
ServerMetadataRequest, ServerMetadataResponse = METHODS["ServerMetadata"]
ServerReadyRequest, ServerReadyResponse = METHODS["ServerReady"]
ModelConfigResponse = METHODS["ModelConfig"][1]
ModelStatisticsResponse = METHODS["ModelStatistics"][1]
RepositoryIndexResponse = METHODS["RepositoryIndex"][1]
SystemSharedMemoryStatusResponse = METHODS["SystemSharedMemoryStatus"][1]
HealthCheckRequest, HealthCheckResponse = HEALTH_METHODS["Check"]
