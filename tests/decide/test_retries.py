"""When refused clients are asked back."""

import heapq
import random

from hypothesis import given
from hypothesis import strategies as st

from tenure.decide.retries import CROWDING, MAX_REMEMBERED, MAX_S, MIN_S, Retries


def crowd(clients, places, place_s, seconds, after_s):
    """Clients ask, are served in turn by one server with so many places, or refused; each asks anew at once when served."""
    chance = random.Random(1)
    asks = [(chance.random() * place_s, client) for client in range(clients)]
    heapq.heapify(asks)
    held, free_at_s, served, refused = [], 0.0, 0, 0
    while asks:
        now_s, client = heapq.heappop(asks)
        if now_s > seconds:
            break
        while held and held[0] <= now_s:
            heapq.heappop(held)
        if len(held) < places:
            free_at_s = max(free_at_s, now_s) + place_s
            heapq.heappush(held, free_at_s)
            served += 1
            heapq.heappush(asks, (free_at_s, client))
        else:
            refused += 1
            heapq.heappush(asks, (now_s + after_s(now_s, len(held)) * chance.uniform(1.0, 1.5), client))
    return served, refused


def test_a_crowd_is_refused_seldom_and_no_place_stays_empty():
    place_s, retries = 0.05, Retries()
    served, refused = crowd(256, 50, place_s, 120, lambda now_s, held: retries.after_s(now_s, held * place_s / 2, place_s))
    assert served >= 0.98 * 120 / place_s
    assert refused < 2 * served
    _, by_queue_alone = crowd(256, 50, place_s, 120, lambda _, held: held * place_s / 2)
    assert by_queue_alone > 3 * refused


def test_one_who_is_refused_alone_comes_back_when_a_place_is_free():
    retries = Retries()
    assert retries.after_s(0.0, 2.0, 0.1) == 2.0
    assert retries.after_s(100.0, 0.5, 0.1) == 0.5
    assert retries.after_s(200.0, 0.0, 0.0) == MIN_S


def test_each_of_many_gets_a_later_time():
    retries = Retries()
    found = [retries.after_s(0.0, 0.0, 3.0) for _ in range(5)]
    assert found == [MIN_S, *(number * 3.0 / CROWDING for number in range(1, 5))]


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 100), st.floats(0, 100)), max_size=200))
def test_hints_stay_within_bounds(refusals):
    retries, now_s = Retries(), 0.0
    for pause_s, wait_s, place_s in refusals:
        now_s += pause_s
        assert MIN_S <= retries.after_s(now_s, wait_s, place_s) <= MAX_S


def test_what_is_remembered_is_bounded():
    retries = Retries()
    for _ in range(2 * MAX_REMEMBERED):
        retries.after_s(0.0, MAX_S, 1.0)
    assert len(retries._due_s) == MAX_REMEMBERED
