from __future__ import annotations

import json
import math
import resource
import signal

from skymoe.train.metrics import MetricsLog, read_metrics


def step_line(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 1 / (step + 1)}


def test_lines_return_as_written_and_nan_becomes_null(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"kind": "train", "step": 1, "loss": math.nan, "layers": {"alpha": [0.1, math.inf]}})
    log.close()
    assert read_metrics(log.path) == [{"kind": "train", "step": 1, "loss": None, "layers": {"alpha": [0.1, None]}}]


def test_going_back_drops_later_lines_and_the_torn_one(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    log.write({"kind": "run", "schema": 1})
    for step in range(6):
        log.write(step_line(step))
    log.close()
    path.write_text(path.read_text() + '{"kind":"train","st')
    log = MetricsLog(path)
    log.truncate_after(3)
    log.write(step_line(4))
    log.close()
    assert [line.get("step") for line in read_metrics(path)] == [None, 0, 1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(step_line(1))
    assert len(read_metrics(log.path)) == 1
    log.close()


def test_when_there_is_no_room_lines_wait_and_arrive_whole(tmp_path):
    """A file size limit is a full disk that one process has to itself."""
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(step_line(0))
    size = log.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        log.write(step_line(1))
        log.flush()
        assert log.path.stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    log.write(step_line(2))
    log.close()
    assert [line["step"] for line in read_metrics(log.path)] == [0, 1, 2]
