# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import json
import math
import os
import signal

import pytest
import torch

from diffusers.optimization import get_scheduler

from diffusers_dyna.training.loop import (
    NonFiniteGuard,
    StopRequest,
    TrainingLog,
    check_resume,
    describe_environment,
    make_ema,
    make_lr_schedule,
    write_json,
)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_the_learning_rate_is_that_of_diffusers_stepped_once_a_step(name):
    rate = make_lr_schedule(name, 2e-4, num_warmup_steps=5, num_training_steps=20)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=2e-4)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=20)
    for step in range(20):
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


def average(ema, parameter, values):
    for value in values:
        parameter.data.fill_(value)
        ema.step([parameter])
    return ema.shadow_params[0].item()


@pytest.mark.parametrize(("decay", "warmup_steps"), [(0.9, 30), (0.99, None), (0.9999, None)])
def test_ema_length_grows_evenly_and_stays(decay, warmup_steps):
    parameter = torch.nn.Parameter(torch.zeros(()))
    ema = make_ema([parameter], decay, warmup_steps)
    length, warmup = 1 / (1 - decay), warmup_steps or 10 / (1 - decay)
    for updates in (2, 5, int(warmup / 2) + 1, int(warmup) + 2, 3 * int(warmup)):
        expected = min(length, 1 + (updates - 1) * (length - 1) / warmup)
        assert 1 / (1 - ema.get_decay(updates)) == pytest.approx(expected, rel=1e-6)
    assert ema.get_decay(3 * int(warmup)) == pytest.approx(decay)


def test_ema_without_warmup_is_the_plain_average():
    parameter = torch.nn.Parameter(torch.zeros(()))
    values = torch.randn(12).tolist()
    expected = values[0]
    for value in values[1:]:
        expected = 0.9 * expected + 0.1 * value
    assert average(make_ema([parameter], 0.9, 0), parameter, values) == pytest.approx(expected, rel=1e-5)
    assert average(make_ema([parameter], 0.0, None), parameter, values) == pytest.approx(values[-1], rel=1e-5)


def test_non_finite_steps_are_counted_and_borne_up_to_a_limit():
    guard = NonFiniteGuard(max_in_a_row=3, total=4)
    assert guard.is_finite(torch.tensor(1.0), 0)
    assert not guard.is_finite(torch.tensor(math.nan), 1)
    assert not guard.is_finite(math.inf, 2)
    assert guard.is_finite(2.0, 3)
    assert not guard.is_finite(math.nan, 4)
    assert not guard.is_finite(math.nan, 5)
    assert guard.total == 8
    with pytest.raises(FloatingPointError, match="not finite in 3 steps in a row, up to step 6"):
        guard.is_finite(math.nan, 6)


def test_the_first_signal_is_a_request_and_the_second_is_not():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    assert stop.signal_number == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal_number == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_log_that_continues_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainingLog(path)
    for step in range(1, 8):
        log.write(step=step, loss=1 / step)
    path.write_text(path.read_text() + '{"step": 8, "lo')  # cut off by a kill
    TrainingLog(path, first_step=5).write(step=6, loss=0.5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    TrainingLog(path)
    assert path.read_text() == ""


def test_resume_lists_every_difference():
    saved = {"seed": 0, "channel_mults": [1, 2], "learning_rate": 1e-4}
    check_resume(saved, {"seed": 0, "channel_mults": (1, 2), "learning_rate": 1e-4})
    with pytest.raises(ValueError) as error:
        check_resume(saved, {"seed": 1, "channel_mults": (1, 2), "learning_rate": 1e-4, "objective": "flow"})
    message = str(error.value)
    assert "seed: 0 in the checkpoint, 1 now" in message
    assert "objective: None in the checkpoint, 'flow' now" in message
    assert "channel_mults" not in message
    assert "--pretrained_model_name_or_path" in message
    # A checkpoint that is older than an argument was made with its default.
    current = {**saved, "skip_grad_norm": None}
    check_resume(saved, current, defaults={"skip_grad_norm": None, "output_dir": "elsewhere"})
    with pytest.raises(ValueError, match="skip_grad_norm: None in the checkpoint, 9.0 now"):
        check_resume(saved, {**current, "skip_grad_norm": 9.0}, defaults={"skip_grad_norm": None})


def test_environment_and_json(tmp_path):
    environment = describe_environment(tmp_path)
    assert environment["commit"] is None  # no git repository
    assert environment["versions"]["torch"] == importlib.metadata.version("torch")
    write_json(tmp_path / "facts.json", environment)
    assert json.loads((tmp_path / "facts.json").read_text()) == environment
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
