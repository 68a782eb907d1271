"""Images/s over a declared link, foretold from local trials; and whether asynchronous calls fill the link.

World: our server, two threads, spinning off, with `vision.mean` (602,112-byte images, costs nothing) and the data folder's
MobileNetV2 (images of the same size, ten milliseconds or more each). The application runs in a network namespace of its own,
joined by `experiments.links`; where the kernel has no netem, the rate is TBF's and the delay that of the TUN forwarder, at its
large MTU. Delay is one way, of each direction. Eight images take turns, every answer is compared.
Local trials: the same namespace and forwarder, which carries the same bytes with no rate, delay or loss: each model over HTTP
and gRPC, one request after the other and many in flight: 16, and of `mean` 64 too. (64 are what the client has on its way at
most. Over 1 Gbit/s and 20 ms, 16 of `mean` are twice what fills the link, but not enough where TCP's congestion control is
BBR: `decide.links`.)
Settings, 12: `mean` over 1 Gbit/s with 20 ms (64 in flight) and over 200 Mbit/s with 5 ms (16), `mobilenet` over 1 Gbit/s with
20 ms (16); each over HTTP and gRPC, one after the other and so many in flight.
Foretold by `decide.links` from the local trials of the same model and transport, the bytes of a request and an answer, the
round trips of the transport and the machine's congestion control. Nothing measured over the link is used.
Rounds: 7 of 1.2 s (--quick: 2 of 0.7 s) for local trials and settings together, order shuffled by the seed; warm connections.
Value: the largest over the 12 settings of |foretold / measured - 1|, the median over rounds, each of which is foretold from
the local trials of the same round (others' work on the machine comes and goes). Bar 1: <= 0.10.
Bar 2: `mean`, 1 Gbit/s, 20 ms, 64 in flight, HTTP and gRPC each: images/s >= 0.9 x min(local, link / bytes), where local is
that of 64 in flight through the forwarder, and bytes the tensor's.
Checked before: to connect over each link takes its two delays within 5 % + 1 ms. A setting in which the forwarder saturated
(`Joined.judge`) voids the run. In a local trial it may: the forwarder then carries more than the link will, and the rate
counts as at least so much; void if that is below link / bytes. Told: the forwarder's CPU, in cores, of each setting.
Control: the same forecast without round trips (the local rate, or the link's if less) must miss bar 1.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import vision
from benchmarks.harness import Control, Options, Result, Skip, interleaved, judge, median, spread
from benchmarks.serving import OURS, Dialogue, serve
from tenure.decide.links import Exchange, LinkForecast, exchange, forecast
from tenure.experiments import links, netns
from tenure.links import DeclaredLink, parse_link
from tenure.usage import summarize

NAME = "link_prediction"
BAR = "images/s over a link foretold within 10 % in 12 settings; async >= 0.9 x min(local, link / bytes) at 1 Gbit/s, 20 ms"
ERROR_BAR, FILL_BAR = 0.10, 0.9
THREADS = 2
FAR, NEAR = "rate=1Gbit,delay=20ms", "rate=200Mbit,delay=5ms"
LOCAL = ""
TRANSPORTS = ("http", "grpc")
MANY = {("mean", FAR): 64, ("mean", NEAR): 16, ("mobilenet", FAR): 16}
ANSWER_BYTES = {"mean": 4, "mobilenet": 4004}
_PROGRAM = Path(__file__).parent / "peers" / "programs" / "over_link.py"


@dataclass(frozen=True, slots=True)
class Place:
    """What is measured: a model over a link (`LOCAL`: none), by a transport, with so many in flight."""

    model: str
    link: str
    transport: str
    in_flight: int

    def __str__(self) -> str:
        """Return it as a name of details."""
        return f"{self.model}_{str(parse_link(self.link)).replace(' ', '_') or 'local'}_{self.transport}_{self.in_flight}"


@dataclass(frozen=True, slots=True)
class Rate:
    """What one round of one place gave."""

    per_s: float
    forwarder_cpus: float
    """Cores; 0 where the kernel delays by itself."""
    invalid: tuple[str, ...]


def run(options: Options) -> Result:
    """Measure local trials and settings in interleaved rounds, then compare."""
    if why_not := netns.available():
        raise Skip(why_not)
    repeats, seconds = (2, 0.7) if options.quick else (7, 1.2)
    mobilenet = options.need_data("vision", "models", "mobilenet_v2_1.0_224_qdq.onnx")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        scratch = Path(folder)
        models = {"mean": vision.mean(scratch / "mean.onnx"), "mobilenet": mobilenet}
        # One server for all links, so that a drift of it is all links': it listens where each of them can reach it.
        served = stack.enter_context(serve(OURS, models, scratch, "--host", "0.0.0.0", threads=THREADS))
        ports = {transport: served.addresses[transport].rpartition(":")[2] for transport in TRANSPORTS}
        joined: dict[str, links.Joined] = {}
        clients: dict[str, Dialogue] = {}
        for index, text in enumerate((LOCAL, FAR, NEAR)):
            link = joined[text] = stack.enter_context(links.joined(parse_link(text), index=index, forwarder=text == LOCAL))
            told = {
                "addresses": {transport: f"{link.near}:{port}" for transport, port in ports.items()},
                "models": {name: str(file) for name, file in models.items()},
                "threads": THREADS,
                "seed": options.seed,
            }
            within = ("ip", "netns", "exec", link.namespace)
            clients[text] = stack.enter_context(Dialogue(f"client over {text}", sys.executable, _PROGRAM, told, within=within))
            check_delay(clients[text], link.declared)
        measured = {place: partial(measure, clients[place.link], joined[place.link], place, seconds) for place in places()}
        named: dict[str, Callable[[], Rate]] = {str(place): call for place, call in measured.items()}
        found = interleaved(named, repeats, seed=options.seed)
        how = joined[FAR].how
    return judged({place: found[str(place)] for place in places()}, how=how, repeats=repeats)


def places() -> list[Place]:
    """Return the local trials and the settings."""
    settings = [(model, link, count) for (model, link), many in MANY.items() for count in (1, many)]
    local = sorted({(model, LOCAL, count) for model, _, count in settings})
    return [Place(model, link, transport, count) for model, link, count in (*local, *settings) for transport in TRANSPORTS]


def check_delay(client: Dialogue, declared: DeclaredLink) -> None:
    """Assert that a round trip takes what was declared."""
    rtt_s, wanted_s = client.ask({"rtt": 9})["rtt_s"], 2 * declared.delay_s
    assert wanted_s <= rtt_s <= 1.05 * wanted_s + 0.001, f"a round trip over {declared} took {rtt_s * 1e3:.2f} ms"


def measure(client: Dialogue, link: links.Joined, place: Place, seconds: float) -> Rate:
    """Return what one round of one place gave."""
    before = link.carried()
    found = client.ask({"transport": place.transport, "model": place.model, "in_flight": place.in_flight, "seconds": seconds})
    after = link.carried()
    if before is None or after is None:
        return Rate(found["per_s"], 0.0, ())
    invalid = links.judged(before, after, link.declared.delay_s)
    return Rate(found["per_s"], (after.cpu_s - before.cpu_s) / (after.at_s - before.at_s), invalid)


def judged(found: Mapping[Place, Sequence[Rate]], *, how: str, repeats: int) -> Result:
    """Compare what was foretold with what was measured."""
    rates = {place: [one.per_s for one in seen] for place, seen in found.items()}
    errors: dict[Place, float] = {}
    naive: dict[Place, float] = {}
    details: dict[str, Any] = {}
    invalid: list[str] = []
    for place in found:
        cpus = median([one.forwarder_cpus for one in found[place]])
        details |= {f"{place}_per_s": median(rates[place]), f"{place}_spread": spread(rates[place])}
        details |= {f"{place}_forwarder_cpus": round(cpus, 3)}
        reasons = [one.invalid for one in found[place] if one.invalid]
        if place.link == LOCAL:
            details[f"{place}_saturated_rounds"] = len(reasons)
            continue
        invalid += [f"{place}: {reasons[0][0]}"] if 2 * len(reasons) > len(found[place]) else []
        rounds = [foretell(place, {other: [seen[number]] for other, seen in rates.items()}) for number in range(repeats)]
        off = [one.images_per_s.value / per_s - 1 for one, per_s in zip(rounds, rates[place], strict=True)]
        errors[place] = median(off)
        least = [min(one.local_images_per_s, one.link_images_per_s) for one in rounds]
        naive[place] = median([most / per_s - 1 for most, per_s in zip(least, rates[place], strict=True)])
        details |= {f"{place}_foretold_per_s": median([one.images_per_s.value for one in rounds])}
        details |= {f"{place}_error": errors[place], f"{place}_error_spread": spread(off), f"{place}_bound": rounds[0].bound}
    filled = {transport: fill(transport, rates, invalid) for transport in TRANSPORTS}
    worst = max(abs(error) for error in errors.values())
    worst_naive = max(abs(error) for error in naive.values())
    control = Control(
        name="no round trips",
        value=worst_naive,
        failed=worst_naive > ERROR_BAR,
        how=f"off by {worst_naive:.0%} in {sum(abs(error) > ERROR_BAR for error in naive.values())} of 12",
    )
    missed = [f"{place} foretold {error:+.1%} off" for place, error in errors.items() if abs(error) > ERROR_BAR]
    missed += [f"asynchronous {name} fills {share:.2f} of it" for name, share in filled.items() if share < FILL_BAR]
    if invalid:
        missed = [f"INVALID: {reason}" for reason in invalid]
    holds, why = judge(not missed, control)
    return Result(
        value=worst,
        spread=None,
        unit="largest relative error of a foretold rate",
        holds=holds,
        why="; ".join(missed) if missed and control.failed else why,
        reference={"name": "asynchronous over min(local, link / bytes), HTTP and gRPC", **filled},
        control=control,
        details={
            **{name: round(value, 4) if isinstance(value, float) else value for name, value in details.items()},
            "link_made_by": how,
            "congestion": links.tcp("http", 1).congestion,
            "rounds": repeats,
            "load_1min": os.getloadavg()[0],
            "cores": os.cpu_count(),
        },
    )


def wire(place: Place) -> Exchange:
    """Return what a request of a place is on the wire."""
    return exchange(place.transport, images=1, image_bytes=vision.IMAGE_BYTES, answer_bytes=ANSWER_BYTES[place.model])


def foretell(place: Place, rates: Mapping[Place, Sequence[float]]) -> LinkForecast:
    """Return the forecast of a setting from its local trials."""
    counts = sorted({1, place.in_flight})
    local = {count: summarize(rates[Place(place.model, LOCAL, place.transport, count)]) for count in counts}
    connections = links.tcp(place.transport, place.in_flight)
    return forecast(parse_link(place.link), wire(place), local, place.in_flight, connections)


def fill(transport: str, rates: Mapping[Place, Sequence[float]], invalid: list[str]) -> float:
    """Return the share of min(local, link / bytes) that asynchronous calls reach; says where local is not known."""
    local = median(rates[Place("mean", LOCAL, transport, MANY["mean", FAR])])
    link = parse_link(FAR).rate_bit_s / 8 / vision.IMAGE_BYTES
    if local < link:
        invalid.append(f"the local rate over {transport}, {local:.0f} images/s, is below the link's {link:.0f}")
    return round(median(rates[Place("mean", FAR, transport, MANY["mean", FAR])]) / min(local, link), 4)
