"""Whether a service gives the same answers in every form it is built in.

Services: 5 engines (NumPy, scikit-learn, ONNX Runtime, LiteRT, PyTorch) with 3 small models each (`benchmarks.image_models`: a
multi-layer perceptron, a convolution or logistic regression, a gradient boosting or the like), made by the seed. NumPy is a
plain program with a v2 door of its own (`benchmarks/programs/numpy_door.py`); the others run in our server.
Forms: the bare process, and `root`, `oci` and `microvm` built from one closure each (one analysis per engine and model).
Requests: 12 per service, the same in every form: 1, 2, 7 and 32 rows, each by HTTP with JSON, HTTP with binary tensors and
gRPC (NumPy's door has none: 8). Values are drawn by the seed in the model's data type, finite. One thread, one instance.
Counts: a cell (engine, model, form) is right when all its answers have the process's status, names, shapes, data types and
bytes. In a microVM whose CPU is emulated, libraries see other vector extensions than outside and choose other kernels, so that
sums are rounded otherwise: there, and nowhere else, floats may differ by 1e-5 + 1e-5 |expected| (FP32) or 1e-12 + 1e-12
|expected| (FP64); integers and text may not. How many cells are equal bit by bit is told beside.
Bar: all cells right (`value` is the share). A form that can't be run here is named in `details`, and is no cell; without
`root` there is no verdict. --quick: NumPy, ONNX Runtime and LiteRT, one model each, `root` and `oci`.
Control: the root form of the first service with the last bit of one weight turned must be called wrong.
Left out: GPUs, several threads (sums in another order are no matter of the form).
"""
