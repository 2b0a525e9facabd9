"""DataWait tells waiting from working."""

import time
from types import SimpleNamespace

import pytest

from lssl.callbacks import DataWait


def test_waiting_and_working_are_told_apart(monkeypatch):
    clock = iter([0.0, 5.0, 6.0, 6.5, 8.5, 100.0, 100.5, 102.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    wait, nothing = DataWait(), SimpleNamespace()
    wait.on_train_epoch_start(nothing, nothing)  # 0
    wait.on_train_batch_start(nothing, nothing, None, 0)  # 5: the first batch, workers started
    wait.on_train_batch_end(nothing, nothing, None, None, 0)  # 6
    wait.on_train_batch_start(nothing, nothing, None, 1)  # 6.5
    wait.on_train_batch_end(nothing, nothing, None, None, 1)  # 8.5
    wait.on_validation_end(nothing, nothing)  # 100: validation is neither
    wait.on_train_batch_start(nothing, nothing, None, 2)  # 100.5
    wait.on_train_batch_end(nothing, nothing, None, None, 2)  # 102.5
    assert wait.started == pytest.approx(5.0)
    assert wait.waited == pytest.approx(1.0)
    assert wait.worked == pytest.approx(4.0)
    assert wait.share == pytest.approx(0.2)
