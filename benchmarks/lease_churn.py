"""Whether every workspace of a morning ends as it should, by the engine's own view, with the engine restarted in the middle.

World: an engine of the benchmark's own with live-restore, `tenure up` with 2 cpus and 1 GiB in a home of its own, container
leases through the public functions (`tenure.leasing`), of 3 tenants in turn. All have 0.2 cpus and 32 MiB, so that at most 10
live at a time and the others queue.
The morning: 50 workspaces (--quick: 12), asked for by 4 holders at once, each of whom takes the next of the script. The script
is shuffled by the seed and has these fates in turn:

- completes: a command that writes a file into its home volume and ends. End: `completed`.
- fails: a command that ends with code 3. End: `failed`.
- too large: a command that takes 64 MiB. End: `out_of_memory`.
- forgotten: a slot of 6 s that nobody renews. End: `expired`.
- kept: a slot of 6 s, renewed for 10 min, resized to 48 MiB, a command run inside, released. End: `released`.
- held: lives until its half of the script is through, and in the first half while the engine is restarted; then a command is
  run inside, and it is given back. End: `released`.

After the first half the engine is ended with SIGTERM and started again, while those that are held live; nobody asks meanwhile.
Measured: the share of workspaces whose end is right: the lease's end reason is that of its fate, and the engine's own event of
the container's death has the exit code of that fate (0; 3; 137 and an `oom` event or `out_of_memory` told by the kernel's
group; 137 or 143 for the last three), one death for each.
Bar: all (1.0), within 5 minutes, and at the end the engine has no container of a lease, the broker no live lease, the node
nothing held. `value` is the share; the length of the morning is in the details.
Control: each workspace judged by the fate of the next one in the script: it must miss the bar.
Left out: environments (their build has nothing to do with the engine), JupyterLab, GPUs, asking while the engine is away.
"""
