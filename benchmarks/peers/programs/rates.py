"""Calls in a row, or many in flight, of a model that costs nothing: how many images a second a way takes.

Run by the interpreter that has the client asked for; ways as in `paired`, and `here` (this process, the image copied into one
buffer first). One argument, a JSON object: file, name, addresses, pid of the server, threads, ways, seed. Then one JSON command
a line, one answer a line: {"way", "seconds", "in_flight"} -> {"count", "took_s", "server_cpu_s", "client_cpu_s"}. in_flight 0:
one call after the other; else so many under way by our client, in tasks of its asynchronous form, or, with `_each` behind the
way, by `Model.predict_each`. Eight images take turns, and every answer is compared.
"""

import asyncio
import itertools
import json
import sys
import time

import numpy as np
from paired import open_way, session
from procs import cpu_s, tree

IMAGES = 8


def check(found, expected, way):
    """Stop at the first wrong answer."""
    if abs(float(found.reshape(-1)[0]) - expected) > 1e-5:
        raise AssertionError(f"{way} answered {found}, not {expected}")


def one_after_the_other(call, images, expected, way, until_s):
    """Return how many calls were answered."""
    for count in itertools.count(1):
        check(call(images[count % IMAGES]), expected[count % IMAGES], way)
        if time.perf_counter() >= until_s:
            return count


async def in_flight(scheme, address, name, images, expected, tasks, seconds):
    """Return how many calls were answered, and in what time, with so many under way; warmed up by one call of each task."""
    from tenure.serve.client import Model

    count = 0
    async with Model(f"{scheme}://{address}", name, timeout_s=60) as model:
        await asyncio.gather(*(model.predict_async(images[0]) for _ in range(tasks)))
        begun_s = time.perf_counter()

        async def client(place):
            nonlocal count
            while time.perf_counter() - begun_s < seconds:
                check(await model.predict_async(images[place]), expected[place], scheme)
                count += 1
                place = (place + 1) % IMAGES

        await asyncio.gather(*(client(number % IMAGES) for number in range(tasks)))
        return count, time.perf_counter() - begun_s


def each(scheme, address, name, images, expected, in_flight, seconds):
    """Return how many calls were answered, and in what time, with so many under way and no event loop; warmed up by as many."""
    from tenure.serve.client import Model

    with Model(f"{scheme}://{address}", name, timeout_s=60) as model:
        model.predict_many(images[:1] * in_flight, in_flight=in_flight)
        begun_s = time.perf_counter()

        def asked():
            for place in itertools.cycle(range(IMAGES)):
                if time.perf_counter() - begun_s >= seconds:
                    return
                yield images[place]

        count = 0
        for found in model.predict_each(asked(), in_flight=in_flight):
            check(found, expected[count % IMAGES], scheme)
            count += 1
        return count, time.perf_counter() - begun_s


def run(work):
    """Return what a coroutine gives, on uvloop: it comes with Tenure."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.Loop) as runner:
        return runner.run(work)


def main():
    """Open all ways, then answer commands until the input ends."""
    told = json.loads(sys.argv[1])
    rng = np.random.default_rng(told["seed"])
    images = [rng.normal(size=(1, 3, 224, 224)).astype(np.float32) for _ in range(IMAGES)]
    expected = [float(image.mean(dtype=np.float64)) for image in images]
    local = session(told["file"], told["threads"])
    buffer = np.empty_like(images[0])

    def here(image):
        np.copyto(buffer, image)
        return local.run(["y"], {"x": buffer})[0]

    ways = {"here": (here, lambda: None)}
    ways |= {way: open_way(way, told["addresses"], told["name"], 1) for way in told["ways"]}
    for way, (call, _) in ways.items():
        one_after_the_other(call, images, expected, way, time.perf_counter() + 0.2)
    print(json.dumps({"ready": list(ways)}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pids, way = tree(told["pid"]), order["way"]
        server_s, client_s, begun_s = cpu_s(pids), time.process_time(), time.perf_counter()
        if order["in_flight"]:
            scheme = way.removesuffix("_each")
            address = told["addresses"]["grpc" if scheme == "grpc" else "http"]
            asked = (scheme, address, told["name"], images, expected, order["in_flight"], order["seconds"])
            count, took_s = run(in_flight(*asked)) if scheme == way else each(*asked)
        else:
            count = one_after_the_other(ways[way][0], images, expected, way, begun_s + order["seconds"])
            took_s = time.perf_counter() - begun_s
        used = {"server_cpu_s": cpu_s(pids) - server_s, "client_cpu_s": time.process_time() - client_s}
        print(json.dumps({"count": count, "took_s": took_s, **used}), flush=True)
    for _, close in ways.values():
        close()


if __name__ == "__main__":
    main()
