"""Time by phase: nothing is counted twice, nothing is lost."""

import pytest

from megamoe.phases import MANY_STAMPS, PhaseClock


class Hand:
    """A clock that is moved by hand."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Stamp:
    """A moment of a queue whose time is the hand's, in milliseconds apart."""

    def __init__(self, hand):
        self.seconds, self.waited = hand.seconds, False

    def elapsed_time(self, end):
        return (end.seconds - self.seconds) * 1000

    def synchronize(self):
        self.waited = True

    def query(self):
        return True


@pytest.fixture(params=["host", "device"])
def clock_and_hand(request):
    hand = Hand()
    clock = PhaseClock(hand)
    if request.param == "device":
        clock.use_device_stamps(lambda: Stamp(hand))
    return clock, hand


def test_an_inner_phase_is_taken_off_the_outer_one(clock_and_hand):
    clock, hand = clock_and_hand
    hand.seconds += 100  # outside of every phase
    with clock.phase("forward"):
        hand.seconds += 2
        with clock.phase("all_to_all"):
            assert clock.current == "all_to_all"
            hand.seconds += 3
        hand.seconds += 5
    with clock.phase("backward"):
        hand.seconds += 7
    assert clock.current is None
    assert clock.take_seconds() == pytest.approx({"forward": 7, "all_to_all": 3, "backward": 7})
    assert clock.take_seconds() == {}


def test_what_is_taken_inside_a_phase_and_after_it_adds_up(clock_and_hand):
    clock, hand = clock_and_hand
    with clock.phase("save"):
        hand.seconds += 1
        assert clock.take_seconds() == pytest.approx({"save": 1})
        hand.seconds += 2
    assert clock.take_seconds() == pytest.approx({"save": 2})


def test_an_error_ends_its_phase(clock_and_hand):
    clock, hand = clock_and_hand

    def fail():
        with clock.phase("update"):
            hand.seconds += 1
            raise ValueError("out of range")

    with pytest.raises(ValueError, match="out of range"):
        fail()
    hand.seconds += 1
    assert clock.current is None
    assert clock.take_seconds() == pytest.approx({"update": 1})


def test_what_is_done_while_validating_is_not_training(clock_and_hand):
    clock, hand = clock_and_hand
    with clock.phase("validate"):
        hand.seconds += 1
        with clock.phase("forward"):
            assert clock.current == "forward", "where it is, is still known"
            hand.seconds += 2
            with clock.phase("save"):
                hand.seconds += 4
    with clock.phase("forward"):
        hand.seconds += 8
    assert clock.take_seconds() == pytest.approx({"validate": 7, "forward": 8})


@pytest.mark.parametrize("is_past", [True, False], ids=["device_follows", "device_is_behind"])
def test_stamps_do_not_pile_up_where_the_device_follows(is_past, monkeypatch):
    monkeypatch.setattr(Stamp, "query", lambda stamp: is_past)
    clock, hand, stamps = PhaseClock(), Hand(), []

    def record():
        stamps.append(Stamp(hand))
        return stamps[-1]

    clock.use_device_stamps(record)
    for _ in range(MANY_STAMPS):
        with clock.phase("forward"):
            hand.seconds += 0.25
        hand.seconds += 1
    assert not any(stamp.waited for stamp in stamps), "nothing waits for the device"
    assert (len(clock._stamps) <= MANY_STAMPS) == is_past
    assert clock.take_seconds() == pytest.approx({"forward": MANY_STAMPS / 4})


def test_changes_are_signs_of_life(clock_and_hand):
    clock, _ = clock_and_hand
    before = clock.num_changes
    with clock.phase("data"):
        inside = clock.num_changes
    assert before < inside < clock.num_changes
