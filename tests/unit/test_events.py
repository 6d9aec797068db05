"""A run's history: lines of many writers, torn lines, numbers that JSON does not have."""

import multiprocessing

from megamoe.runs.events import EVENTS_FILE, append_event, read_events


def write_many(folder, writer):
    for number in range(50):
        append_event(folder, "alert", "x" * 300, writer=writer, number=number)


def test_events_of_several_processes_are_all_there_and_whole(tmp_path):
    writers = [multiprocessing.get_context("fork").Process(target=write_many, args=(tmp_path, n)) for n in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(30)
    events = read_events(tmp_path)
    assert len(events) == 200
    for writer in range(4):
        assert [event["number"] for event in events if event["writer"] == writer] == list(range(50))
    assert all(event["kind"] == "alert" and event["time"] > 1e9 for event in events)


def test_torn_and_foreign_lines_are_left_out(tmp_path):
    append_event(tmp_path, "start", "training begins", step=0, loss=float("nan"))
    with open(tmp_path / EVENTS_FILE, "a") as file:
        file.write('[1]\n{"no": "kind"}\n{"time": 1, "ki')
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["step"], event["loss"], event["nonfinite"]) == ("start", 0, None, ["loss"])


def test_a_run_without_events_has_none(tmp_path):
    assert read_events(tmp_path) == []
