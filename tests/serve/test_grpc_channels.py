import contextlib

from tenure.serve.transports.grpc import CHANNEL_BYTES, MAX_CHANNELS, Channels

LARGE = bytes(CHANNEL_BYTES // 4)


class FakeChannel:
    """A channel on which nothing is sent."""

    def unary_unary(self, method, **options):
        return method


class Clock:
    """Goes on by `step_s` each time it is asked."""

    def __init__(self, step_s):
        self.step_s, self.now_s = step_s, 0.0

    def __call__(self):
        self.now_s += self.step_s
        return self.now_s


def channels(call_s=0.040):
    found = Channels(lambda address, options: FakeChannel(), "10.0.0.2:8001", now_s=Clock(call_s))
    with found.lane(b""):  # such as asking for the model's metadata
        pass
    return found


def entered(found, count, message=LARGE):
    stack = contextlib.ExitStack()
    return stack, [stack.enter_context(found.lane(message)) for _ in range(count)]


def test_small_or_few_requests_share_one_connection():
    found = channels()
    for count, message in ((5, LARGE), (1000, b"x" * 1000)):
        stack, lanes = entered(found, count, message)
        stack.close()
        assert set(lanes) == {found.lanes[0]}


def test_large_requests_in_flight_together_get_more_connections_up_to_a_bound():
    found = channels()
    stack, lanes = entered(found, 100)
    assert len(found.lanes) == MAX_CHANNELS
    counts = [lanes.count(lane) for lane in found.lanes]
    assert max(counts) - min(counts) <= 1, "the channel with the fewest bytes in flight is taken"
    stack.close()
    assert [lane.in_flight_bytes for lane in found.lanes] == [0] * MAX_CHANNELS


def test_a_server_that_has_answered_at_once_is_near_and_one_connection_carries_it_all():
    found = channels(call_s=0.002)
    with entered(found, 100)[0]:
        assert len(found.lanes) == 1


def test_a_failed_request_gives_its_place_back():
    found = channels()
    with contextlib.suppress(LookupError), found.lane(LARGE):
        raise LookupError
    assert found.lanes[0].in_flight_bytes == 0


def test_a_refusal_that_comes_at_once_does_not_make_a_server_near():
    found = channels()
    found_s = found.quickest_s
    with contextlib.suppress(LookupError), found.lane(LARGE):
        raise LookupError
    assert found.quickest_s == found_s
