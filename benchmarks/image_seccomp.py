"""How few system calls a service's profile allows, and whether it ever stops what it should let through.

Services: the perceptron of `benchmarks.image_models` with each of the 5 engines, profile as the product makes it from the
analysis of that service.
Count: different names that the profile of x86-64 allows, with or without conditions on arguments; names of other
architectures do not count. The whole profile: what a container engine's own start needs inside the filter is part of it.
False kills: the first 100 held-out runs of each engine (`benchmarks.image_grammar`, --quick: 4 of each of NumPy, ONNX Runtime
and LiteRT) lived under the profile, in the root form, or in a container where the process runtime can't filter. A run whose
outcome (see `image_soundness`) is not that of the same form without a profile is a false kill; the kernel's log or the exit
names the call where it can.
Bar: at most 55 names for every engine (`value` is the largest), and no false kill. By hand 42 to 53 were traced.
Checked: inside, calls that are in no list (`ptrace`, `unshare` of a user namespace, `keyctl`, `bpf`, `mount`) are refused.
Control: the profile without the call by which the server waits for its connections: its first run must be stopped.
"""
