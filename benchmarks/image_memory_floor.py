"""The least memory in which a microVM serves.

Service: ONNX Runtime with the perceptron of `benchmarks.image_models` in our server, one thread, the `microvm` form.
Serves: boots, and answers 1 row and 32 rows by JSON, by binary tensors and by gRPC, each twice, all right, the first within
60 s of the start; then ends by itself within 20 s of being told to. Memory: what the monitor is told, MiB.
Search: bisection between 32 and 512 MiB in steps of 8. The floor must serve in two further boots, and 8 MiB less must fail in
two of three. --quick: no search; 128 MiB must serve.
Bar: at most 128 MiB (`value` is the floor). By hand, single runs: 320 with everything in memory; nanos 128.
Checked: where it fails, the end or the console says that memory was short; a failure for another reason is not a floor and
ends the measurement with its reason.
Control: the same files all in the initial memory disk, with 128 MiB, must not serve.
"""
