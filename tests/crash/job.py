"""What the leases of the scenario run: says in a journal outside the home when it begins, what it finds, when it is through.

``python -S -E job.py JOURNAL task|event|sleep SECONDS``. Standard library only, and nothing of the package.
It leaves a child that it never waits for (forked twice): nothing but the lease's end may end that one.
"""

import json
import os
import sys
import time

ENV = os.environ


def note(**fields):
    """Append one line to the journal; a line is one write, so that lines of several processes do not mix."""
    line = {
        "at_s": time.clock_gettime(time.CLOCK_BOOTTIME),
        "pid": os.getpid(),
        "lease": ENV["TENURE_LEASE_ID"],
        "attempt": int(ENV["TENURE_ATTEMPT"]),
        "fence": int(ENV["TENURE_FENCE"]),
        "stage": ENV["TENURE_STAGE"],
        "worker": int(ENV["TENURE_WORKER"]),
    }
    os.write(JOURNAL, json.dumps(line | fields).encode() + b"\n")


def others():
    """Return who else lives under this lease, or as this worker of this stage: [pid, lease, attempt]."""
    mine = {name: ENV[name] for name in ("TENURE_HOME", "TENURE_RUN_ID", "TENURE_STAGE", "TENURE_WORKER")}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as stream:
                theirs = dict(pair.split("=", 1) for pair in stream.read().decode(errors="replace").split("\0") if "=" in pair)
            with open(f"/proc/{name}/stat") as stream:
                state = stream.read().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX" and all(theirs.get(key) == value for key, value in mine.items()):
            found.append([int(name), theirs.get("TENURE_LEASE_ID"), theirs.get("TENURE_ATTEMPT")])
    return found


def leave_a_child():
    """Fork twice, so that the child belongs to nobody but the lease."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)
    os.setsid()
    time.sleep(60)
    os._exit(0)


def publish(name, **event):
    """Publish an event create-exclusively; one that is there already was published by an earlier attempt."""
    folder = f"{ENV['TENURE_RUN_DIR']}/store/events"
    draft = f"{folder}/.{name}.{os.getpid()}"
    with open(draft, "w") as stream:
        json.dump(event, stream)
    try:
        os.link(draft, f"{folder}/{name}.json")
    except FileExistsError:
        pass
    os.unlink(draft)


def main(mode, seconds):
    """Do the work of one attempt."""
    event = {}
    if mode == "event":
        with open(ENV["TENURE_EVENT_FILE"]) as stream:
            event = json.load(stream)
    name = os.path.basename(ENV.get("TENURE_EVENT_FILE", "")).removesuffix(".json")
    note(what="start", event=name, others=others())
    leave_a_child()
    time.sleep(seconds)
    state = "done"
    if event.get("left"):
        publish(f"e{event['left'] - 1}", worker=event["worker"], left=event["left"] - 1)
        state = "continue"
    folder = ENV["TENURE_WORKER_DIR"]
    with open(f"{folder}/.result", "w") as stream:
        json.dump({"state": state}, stream)
    os.rename(f"{folder}/.result", f"{folder}/result.json")
    note(what="through", event=name, state=state)


if __name__ == "__main__":
    JOURNAL = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    main(sys.argv[2], float(sys.argv[3]))
