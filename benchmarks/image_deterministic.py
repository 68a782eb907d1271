"""Whether two builds give the same bytes.

Service: ONNX Runtime with the perceptron of `benchmarks.image_models`, forms `root`, `oci` and `microvm` (where they can be
built).
Two whole builds by the command line, analysis included, that differ in: $TENURE_HOME and the working directory; the folder in
which the model lies; the uid (root's and another, where the benchmark runs as root; told otherwise); LANG, LC_ALL and TZ;
PYTHONHASHSEED; umask; the order in which a folder's files were made and their times (model and home are copied anew,
backwards, with the times of another year); the clock (the second build is later by at least 2 s; by years where a library that
feigns the time is there, told). The interpreter and its environment stay where they are: they cannot be moved.
Compared: sha256 of image.oci.tar, of the microVM's root and initial memory disk, of seccomp.json; of `root` the hash of sorted
path, type, mode, content or target; and the closure's content hash.
Bar: all the same (`value`: artefacts that differ, 0). An artefact that differs is told with its first different member.
Control: a tar by Python's `tarfile.add` of both roots must differ.
"""
