#!/usr/bin/env python3
"""Writes tests/golden/report/scalars.tfevents with the Python package `tensorboard` (pip install tensorboard).

Usage: python scripts/golden/tensorboard_events.py
"""
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

WALL_TIME = 1700000000.25
SCALARS = [  # step, tag, value
    (0, "train/loss", 10.375),
    (1, "train/loss", 0.0),
    (300, "train/lr", 0.001),
    (2**40, "valid/loss", float("inf")),
    (7, "x" * 200, -1.5),
]


def main():
    path = Path(__file__).resolve().parents[2] / "tests/golden/report/scalars.tfevents"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        events = [Event(wall_time=WALL_TIME, file_version="brain.Event:2")]
        events.append(Event(wall_time=WALL_TIME, step=301, session_log=SessionLog(status=SessionLog.START)))
        for step, tag, value in SCALARS:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            events.append(Event(wall_time=WALL_TIME, step=step, summary=summary))
        for event in events:
            writer.write(event.SerializeToString())
        writer.flush()
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
