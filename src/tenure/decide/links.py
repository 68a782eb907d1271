"""What follows from a declared link: images/s over it, foretold from trials made without it, and what bounds them. Pure.

A request goes round: it is worked on locally (client, server, the model), and it is under way for

    Z = round trips x 2 x delay + what sending takes: the link's rate, the connection's window or pacing, whichever is slowest

With n of them local at once, local trials say how many images a second come out, mu(n); by Little's law the others, X x Z, are
under way. So X = mu(in_flight - X x Z), and never more than the link carries. One request after the other is in_flight = 1.
Constants are TCP's own, but for two that were measured (what of a send buffer is payload, how far BBR keeps a window). Not
modelled: loss; and BBR between few requests in flight and many, see `enough_in_flight`. Nothing is made or measured here:
`experiments.links` makes links.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tenure.errors import SpecError
from tenure.links import DeclaredLink
from tenure.trials import Prediction
from tenure.usage import Summary

Bound = Literal["local", "link", "window", "round trips"]

HEADER_BYTES = 52
"""Of each packet: IPv4 (20) and TCP with timestamps (32)."""
LEAST_BURST_BYTES = 68_000
"""64 KB of one TCP stream, which the kernel hands over as one packet, with the headers of its parts."""
BURST_S = 1e-4
"""How long a timer of the kernel may be late: what a rate gives meanwhile must not be lost."""
FIRST_WINDOW_BYTES = 65_535
"""What an HTTP/2 stream may send before the server has opened its window (RFC 9113, 6.9.2): past it, one more round trip."""
WINDOW_SHARE = 0.67
"""Of a connection's largest send buffer that is payload; the rest is bookkeeping of packets (measured: 0.57 Gbit/s of one
connection over 40 ms with 4 MiB, at either MTU)."""
WINDOW_BYTES = int(4 * 2**20 * WINDOW_SHARE)
"""Payload that one connection has under way at most with Linux's default send buffer (tcp(7), tcp_wmem)."""
BBR_GAIN = 2.885 * 0.99
"""BBR sends so much faster than what it last saw delivered per second while its streams pause between requests: 2 / ln 2, less
its margin of 1 % (Linux, net/ipv4/tcp_bbr.c: bbr_high_gain, bbr_pacing_margin_percent)."""
BBR_IN_FLIGHT = 6.0
"""Times the bytes that fill a link, after which BBR's pacing of requests no longer holds it back: 64 requests of 0.6 MB over
1 Gbit/s and 40 ms gave 0.96 of the link, 32 gave 0.79, 16 gave 0.69; cubic gave 0.96 from 16 on."""
MODEL_ERROR = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What one request and its answer put on the link."""

    images: int
    """In one request."""
    up: tuple[int, ...]
    """Bytes of the request, by parts: after each the other side is waited for, so there are as many round trips."""
    down_bytes: int

    @property
    def most_bytes(self) -> int:
        """The greater of request and answer; at least 1."""
        return max(sum(self.up), self.down_bytes, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """What TCP allows."""

    count: int
    """Over which the requests in flight are spread."""
    congestion: str = "cubic"
    """The sender's congestion control: bbr paces, others send a request at once."""
    window_bytes: int = WINDOW_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkForecast:
    """What is expected over a link, and why."""

    images_per_s: Prediction
    bound: Bound
    """What more of would help: a faster model or machine, a faster link, more connections, or more requests in flight."""
    local_images_per_s: float
    """Without the link, with all requests in flight at once."""
    link_images_per_s: float
    """What the link carries; infinite without a rate."""
    round_trips_s: float
    sending_s: float
    """Of one request, with the link to itself."""


def burst_bytes(link: DeclaredLink) -> int:
    """Return what passes at once after a pause, before the declared rate holds (the bucket of tc-tbf(8)); 0 without a rate."""
    return max(LEAST_BURST_BYTES, int(link.rate_bit_s / 8 * BURST_S)) if link.rate_bit_s else 0


def exchange(transport: str, *, images: int, image_bytes: int, answer_bytes: int) -> Exchange:
    """Return what a request of so many images is on the wire over ``http`` or ``grpc``; sizes are of one image each."""
    if transport not in ("http", "grpc"):
        raise SpecError(f"over a link go http and grpc; found {transport!r}")
    up_bytes = images * image_bytes
    first = FIRST_WINDOW_BYTES if transport == "grpc" else up_bytes
    up = (first, up_bytes - first) if up_bytes > first else (up_bytes,)
    return Exchange(images=images, up=up, down_bytes=images * answer_bytes)


def carried_per_s(link: DeclaredLink, what: Exchange) -> float:
    """Return how many requests a second the link carries, its packets' headers counted; infinite without a rate."""
    if not link.rate_bit_s:
        return math.inf
    headers = link.packet_bytes / (link.packet_bytes - HEADER_BYTES)
    return link.rate_bit_s / 8 / (what.most_bytes * headers)


def sending_s(link: DeclaredLink, parts: Sequence[int], connections: Connections) -> float:
    """Return how long what one side says in turn is on its way out, delays apart, with the link its own and idle before.

    parts: bytes, each sent after an answer to the one before.
    """
    rtt_s, rate = 2 * link.delay_s, link.rate_bit_s / 8
    pauses = connections.congestion == "bbr" and rtt_s > 0
    pace = _pace(link, max(parts), rtt_s) if pauses else math.inf
    total_s = 0.0
    for size_bytes in parts:
        on_link_s = max(0.0, size_bytes - burst_bytes(link)) / rate if rate else 0.0
        in_window_s = max(0.0, size_bytes / connections.window_bytes - 1) * rtt_s
        total_s += max(on_link_s, in_window_s, _waited(link, size_bytes, rtt_s) * size_bytes / pace if pauses else 0.0)
    return total_s


def forecast(
    link: DeclaredLink, what: Exchange, local: Mapping[int, Summary], in_flight: int, connections: Connections
) -> LinkForecast:
    """Return images/s expected over a link with so many requests in flight.

    local: images/s by requests in flight, measured without the link on the same machine, by the same transport and batch; one
    request in flight is needed, and as many as are asked about. Raises SpecError where they are missing, and for a lossy link.
    """
    if link.loss:
        raise SpecError("nothing is foretold for a link that loses packets: what TCP makes of loss depends on when it happens")
    if 1 not in local or in_flight not in local:
        raise SpecError(f"local trials with 1 and {in_flight} requests in flight are needed; there are {sorted(local)}")
    sends_s = sending_s(link, what.up, connections) + sending_s(link, (what.down_bytes,), connections)
    round_trips_s = len(what.up) * 2 * link.delay_s
    rates = {count: summary.mean / what.images for count, summary in local.items()}
    caps: dict[Bound, float] = {"local": rates[in_flight], "link": carried_per_s(link, what), "window": math.inf}
    if in_flight > 1 and link.delay_s:
        caps["window"] = connections.count * connections.window_bytes / (2 * link.delay_s * what.most_bytes)
    cap = min(caps.values())
    around = _around(rates, in_flight, round_trips_s + sends_s)
    per_s = min(around, cap)
    bound: Bound = "round trips" if around < 0.97 * cap else min(caps, key=lambda name: caps[name])
    value = per_s * what.images
    error = MODEL_ERROR + max(summary.standard_error / summary.mean for summary in (local[1], local[in_flight]))
    low = value * max(0.0, 1 - error)
    if connections.congestion == "bbr" and bound == "link" and 1 < in_flight < enough_in_flight(link, what, connections):
        low *= 2 / 3  # see BBR_IN_FLIGHT
    return LinkForecast(
        images_per_s=Prediction(value=value, low=low, high=value * (1 + error)),
        bound=bound,
        local_images_per_s=rates[in_flight] * what.images,
        link_images_per_s=caps["link"] * what.images,
        round_trips_s=round_trips_s,
        sending_s=sends_s,
    )


def enough_in_flight(link: DeclaredLink, what: Exchange, connections: Connections) -> int:
    """Return how many requests in flight fill the link, whatever the server takes for them; 1 without a rate."""
    if not link.rate_bit_s:
        return 1
    filling = carried_per_s(link, what) * len(what.up) * 2 * link.delay_s
    return math.ceil(1 + filling * (BBR_IN_FLIGHT if connections.congestion == "bbr" else 1.0))


def _pace(link: DeclaredLink, size_bytes: int, rtt_s: float) -> float:
    """Return the bytes per second at which BBR sends messages with a pause before each; infinite for one packet.

    It saw the last message delivered within a round trip and its sending, and sends this one `BBR_GAIN` times as fast. So with
    y = size / pace and f the part of it that is waited for: y = (rtt + f y) / gain.
    """
    waited = _waited(link, size_bytes, rtt_s)
    return size_bytes * (BBR_GAIN - waited) / rtt_s if waited else math.inf


def _waited(link: DeclaredLink, size_bytes: int, rtt_s: float) -> float:
    """Return the part of a message before whose last packet TCP's pacing waits.

    It sends about a millisecond's worth at once, up to 64 KB (Linux, net/ipv4/tcp_output.c: tcp_tso_autosize); the first costs
    no wait, and the second half of one (tcp_update_skb_after_send).
    """
    packet_bytes = max(link.packet_bytes, min(float(1 << 16), BBR_GAIN * size_bytes / rtt_s / 1024))
    return max(0.0, 1 - 1.5 * packet_bytes / max(size_bytes, 1))


def _around(rates: Mapping[int, float], in_flight: int, under_way_s: float) -> float:
    """Return the rate X with X = mu(in_flight - X x under_way_s), by halving."""
    low, high = 0.0, _mu(rates, in_flight)
    for _ in range(60):
        middle = (low + high) / 2
        if _mu(rates, in_flight - middle * under_way_s) > middle:
            low = middle
        else:
            high = middle
    return low


def _mu(rates: Mapping[int, float], local: float) -> float:
    """Return requests per second with so many of them local.

    Between measured points, how long a request stays (their number / rate) goes in a straight line: each more waits for those
    before it, as in a balanced closed network (Zahorjan et al. 1982). Below the first nobody waits, above the last nothing is
    gained.
    """
    points = sorted(rates.items())
    (least, rate), (_, highest) = points[0], points[-1]
    if local <= least:
        return max(0.0, local) * rate / least
    for (less, slower), (more, faster) in itertools.pairwise(points):
        if local <= more:
            stays_s = less / slower + (more / faster - less / slower) * (local - less) / (more - less)
            return local / stays_s
    return highest
