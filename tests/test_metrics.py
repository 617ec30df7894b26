"""metrics: files that are whole or absent, rows that survive resuming, rates by a set clock."""

import io
import json
import math
import statistics
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl import UserError, __version__, metrics
from nanokl.metrics import Log, distinct_n, duration, mean_se, read_rows, write_json

FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)
JSONS = st.recursive(
    FLOATS | st.integers(-(10**9), 10**9) | st.text(max_size=5) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told to: clock[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


# ------------------------------------------------------------------------------ mean and se
@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_mean_se_equals_the_statistics_module(xs):
    mean, se = mean_se(np.array(xs))
    assert mean == pytest.approx(statistics.fmean(xs), abs=1e-9)
    assert se == pytest.approx(statistics.stdev(xs) / math.sqrt(len(xs)), abs=1e-9)


def test_mean_se_takes_bools_bf16_gradients_and_single_values():
    assert mean_se(torch.tensor([True, False, True, True])) == pytest.approx((0.75, 0.25))
    x = torch.tensor([1.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    assert mean_se(x) == (2.0, 1.0)
    mean, se = mean_se([7])
    assert mean == 7.0 and math.isnan(se)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(2, 2), torch.tensor(1.0)])
def test_mean_se_refuses_what_is_no_sample(bad):
    with pytest.raises(AssertionError):
        mean_se(bad)


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (3661, "1:01:01"), (math.inf, "?")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


# ------------------------------------------------------------------------------------- JSON
def nulled(x):
    """The oracle: what should come back from a JSON file."""
    if isinstance(x, dict):
        return {key: nulled(value) for key, value in x.items()}
    if isinstance(x, list):
        return [nulled(value) for value in x]
    return None if isinstance(x, float) and (x != x or abs(x) == float("inf")) else x


@settings(max_examples=25, deadline=None)
@given(JSONS)
def test_write_json_is_strict_json_with_null_for_nan(tmp_path_factory, obj):
    path = tmp_path_factory.mktemp("json") / "x.json"
    write_json(path, obj)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text("utf-8"), parse_constant=refuse) == nulled(obj)


def test_write_json_takes_tensors_arrays_numbers_and_paths(tmp_path):
    obj = {
        "tensor": torch.tensor([1.0, math.nan]),
        "array": np.arange(2),
        "scalar": np.float32(0.5),
        "double": np.float64("inf"),
        "path": tmp_path,
        3: (1, 2),
    }
    write_json(tmp_path / "x.json", obj)
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "tensor": [1.0, None],
        "array": [0, 1],
        "scalar": 0.5,
        "double": None,
        "path": str(tmp_path),
        "3": [1, 2],
    }


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    with pytest.raises(OSError):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_read_rows_leaves_out_a_torn_end_and_names_a_damaged_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes('{"step": 1}\n{"step": 2, "text": "é'.encode()[:-1])  # cut inside the é
    assert read_rows(path) == [{"step": 1}]
    for damage in ("{oops", "7", "\x00"):
        path.write_text('{"step": 1}\n' + damage + '\n{"step": 3}\n')
        with pytest.raises(UserError, match="line 2") as caught:
            read_rows(path)
        assert "\n" not in str(caught.value)
    assert read_rows(tmp_path / "none.jsonl") == []


# -------------------------------------------------------------------------------------- log
def train(out, clock, first, last, resume_step=0):
    with Log(out, total=10, unit="step", resume_step=resume_step) as log:
        for step in range(first, last + 1):
            clock[0] += 1.0
            log.step(step, loss_nats_per_token=1 / step, lr=math.nan)
            if step % 4 == 0:
                log.event(step, val_bits_per_byte=2 / step)
    return out / "metrics.jsonl"


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, clock):
    whole = train(tmp_path / "whole", clock, 1, 10)
    path = train(tmp_path / "parts", clock, 1, 7)
    with open(path, "a") as file:
        file.write('{"step": 8, "sec')  # the crash came while a row was being written
    clock[0] += 500.0  # a night passes between the sittings
    train(tmp_path / "parts", clock, 5, 10, resume_step=4)
    assert path.read_text() == whole.read_text()
    rows = read_rows(path)
    assert rows[0] == {"step": 1, "seconds": 1.0, "loss_nats_per_token": 1.0, "lr": None}
    assert [row["step"] for row in rows if "val_bits_per_byte" in row] == [4, 8]


def test_rows_of_the_resumed_step_stay_and_a_failed_cut_loses_none(tmp_path, clock, monkeypatch):
    path = train(tmp_path, clock, 1, 6)
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "fsync", full)
        with pytest.raises(OSError):
            Log(tmp_path, total=10, unit="step", resume_step=4)
    assert path.read_bytes() == before
    with Log(tmp_path, total=10, unit="step", resume_step=4):
        pass
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:5])  # 4 steps, 1 event


def test_close_writes_the_summary_and_says_where(tmp_path, clock, capsys):
    out = tmp_path / "gpt"
    log = Log(out, total=2, unit="step")
    clock[0] += 83.0
    log.close({"bits_per_byte": 1.5, "pearson_r": {"movie": 0.7}, "curve": [1, 2], "bad": math.nan})
    summary = json.loads((out / "summary.json").read_text())
    assert summary["wall_seconds"] == 83.0 and summary["version"] == __version__
    assert "torch" in summary["machine"] and summary["bad"] is None and summary["curve"] == [1, 2]
    printed = capsys.readouterr().out
    assert datetime.fromisoformat(summary["date"]).utcoffset() == timedelta(0)
    assert "gpt done in 0:01:23" in printed and str(out / "summary.json") in printed
    assert printed.split().count("pearson_r.movie") == 1 and "curve " not in printed


def test_status_in_a_pipe_is_a_line_every_five_seconds(tmp_path, clock, capsys):
    log = Log(tmp_path / "bert", total=100, unit="step")
    for step in range(1, 101):
        clock[0] += 0.5
        log.step(step, loss_nats_per_token=2.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10  # 50 s; the last step is always shown
    assert lines[0] == "bert 10/100 step  2 step/s  ETA 0:00:45  loss_nats_per_token 2"
    assert lines[-1].startswith("bert 100/100") and "ETA 0:00:00" in lines[-1]


def test_eta_follows_the_recent_rate(tmp_path, clock, capsys):
    log = Log(tmp_path, total=1000, unit="step")
    for step in range(1, 201):
        clock[0] += 10.0 if step <= 20 else 1.0  # a slow start, then ten times as fast
        log.step(step)
    assert " 1 step/s  ETA 0:13:20 " in capsys.readouterr().out.splitlines()[-1] + " "


def test_status_on_a_terminal_overwrites_itself_and_never_wraps(tmp_path, clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(metrics.sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    with Log(tmp_path, total=10, unit="step") as log:
        for step in (1, 2):
            clock[0] += 1.0
            log.step(step, a_long_name_with_its_unit_nats_per_token=1.0)
        assert "\n" not in terminal.getvalue() and terminal.getvalue().count("\r\x1b[K") == 2
        assert all(len(part) < 40 for part in terminal.getvalue().split("\r\x1b[K"))
        log.event(2, val_bits_per_byte=1.0)
        assert terminal.getvalue().endswith("\n")
        clock[0] += 1.0
        log.step(3)
    assert terminal.getvalue().endswith("\n")  # an error message would start on a fresh line


def test_only_the_main_process_writes_and_prints(tmp_path, capsys):
    with Log(tmp_path / "run", total=2, unit="step", is_main=False) as log:
        log.step(2, loss=1.0)
        log.event(2, loss=1.0)
        log.line("hello")
        log.close({})
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_distinct_n_by_hand():
    assert distinct_n([[1, 2, 1, 2]]) == 2 / 3  # 12 21 12
    assert distinct_n([[1, 2, 3], [2, 3, 4]]) == 3 / 4  # 12 23, 23 34: none across the rows
    assert distinct_n([[1, 2, 3], [2, 3, 4]], n=1) == 4 / 6
    assert distinct_n([[5], []]) == 0 and distinct_n([[1, 2, 3], [7, 8]]) == 1
