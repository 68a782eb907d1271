"""How large the root of a small service is, against what cannot be left out.

Service: the multi-layer perceptron 64-32-10 on digits of `benchmarks.image_models`, in our server (NumPy: its program), with
each of the 5 engines, built by `tenure image build` as anybody would, shrinking steps as the product keeps them.
Size: bytes of all regular files of the root form, a file with several names once, no rounding to blocks, symbolic links 0;
interpreter, model and our server included. 1 MB is 10^6 bytes.
Indivisible: the sum, at their size in the image, of those files that a process of the service has mapped (its /proc/PID/maps,
after the exercise) and that are: shared objects of the engine's own packages (ONNX Runtime: onnxruntime; LiteRT:
ai_edge_litert; scikit-learn: sklearn, scipy and the OpenMP library they bring; PyTorch: torch and what its wheel brings; NumPy:
none), libpython (or the interpreter where it is linked into it), libc with its loader, libm, libstdc++ and libgcc_s, NumPy's
core (numpy/_core/*.so), and NumPy's OpenBLAS with its Fortran libraries for NumPy and scikit-learn only: the others never call
it. scipy's own OpenBLAS counts for scikit-learn.
Checked first: the service answers in the root form what the bare process answers (12 requests of `image_answers`).
Bar: size by indivisible at most 1.25 for NumPy, scikit-learn, ONNX Runtime and LiteRT, and PyTorch at most 450 MB; `value`: the
worst of the four ratios.
Reference, in the same run: the closure before shrinking, and the interpreter with the whole environment. By hand, single runs:
ONNX Runtime 110 MB (indivisible about 53), LiteRT 105 (48), scikit-learn 207, PyTorch 545; Debian with the environment 361,
355, 488, 1074.
Control: the closure of the first engine without shrinking must miss the bar.
"""
