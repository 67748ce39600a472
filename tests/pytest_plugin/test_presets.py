"""The preset of a run: which one a device gets, and what it makes of workloads and of the memory of a GPU."""

import argparse
from pathlib import Path

import pytest
from support.nvml_stand_in import Script
from support.small_suite import SUITE, pytest_in, write

from mpscale.core.device import Device
from mpscale.core.mode import default_modes
from mpscale.presets import GPU_PRESET, PRESETS, preset_for
from mpscale.pytest_plugin import options
from mpscale.workloads import registry

CPU = Device("cpu", "CPU", memory_mib=65536.0)


def gpu(memory_mib, capability=(9, 0)):
    return Device("gpu", "GPU", "GPU-1", capability, memory_mib)


class Config:
    """What the options ask of pytest's config."""

    rootpath = Path()

    def __init__(self, device, *given):
        parser = argparse.ArgumentParser(exit_on_error=False)
        options.add_options(parser.add_argument)
        self._given, self.stash = parser.parse_args(given), pytest.Stash()
        options.choose_preset(self, device)

    def getoption(self, name, default=None):
        return getattr(self._given, name, default)


@pytest.mark.parametrize(
    ("device", "named", "preset", "why"),
    [
        (CPU, None, "small", "CPU"),
        (gpu(81559.0), None, "gpu", "79.6 GiB; --mp-preset"),
        (gpu(8188.0), None, "gpu", "8.0 GiB"),
        (gpu(6144.0), None, "small", "6.0 GiB, and gpu needs 8 GB"),
        (gpu(None), None, "small", "unknown"),
        (gpu(81559.0), "smoke", "smoke", "asked for"),
        (CPU, "gpu", "gpu", "asked for"),
    ],
)
def test_the_preset_follows_the_device_unless_it_is_named(device, named, preset, why):
    name, reason = preset_for(device, named)
    assert name == preset
    assert why in reason


@pytest.mark.parametrize(
    ("memory_mib", "batch"),
    [
        (8188.0, 16),  # RTX 4060
        (15360.0, 32),  # T4, which is sold with 16 GB
        (23034.0, 64),  # L4, with error correction
        (40536.0, 96),
        (81559.0, 192),
        (143771.0, 192),
        (None, 16),
        (4864.0, None),
    ],
)
def test_the_batch_follows_the_memory(memory_mib, batch):
    assert PRESETS[GPU_PRESET].apart["resnet50"].batch(memory_mib) == batch


def test_a_large_workload_is_planned_for_two_pairs_of_processes_and_a_small_one_for_a_verdict():
    config, device = Config(gpu(81559.0)), gpu(81559.0)
    large = options.settings(config, "resnet50", device.memory_mib)
    assert (options.seeds(config, "resnet50"), options.repeats(config, "resnet50")) == (1, 1)
    assert (large.batch_size, large.train_steps, large.autotune, large.energy_s) == (192, 20, "shared", 10.0)
    assert [mode.name for mode in options.modes(config, "resnet50", device)] == [
        "fp32", "tf32", "mixed-dynamic", "mixed-bf16"
    ]  # fmt: skip
    small = options.settings(config, "mnist1d-cnn", device.memory_mib)
    assert (options.seeds(config, "mnist1d-cnn"), options.repeats(config, "mnist1d-cnn")) == (3, 0)
    assert (small.batch_size, small.train_steps, small.autotune, small.energy_s) == (None, None, "fresh", 0.0)
    assert options.modes(config, "mnist1d-cnn", device) == default_modes(device)


def test_a_workload_of_the_small_preset_has_the_same_series_in_the_gpu_preset():
    timing = [
        (given.timing_s, given.timing_blocks, given.train_steps, given.autotune)
        for given in (
            options.settings(Config(gpu(81559.0)), "mnist1d-cnn", 81559.0),
            options.settings(Config(gpu(81559.0), "--mp-preset=small"), "mnist1d-cnn", 81559.0),
        )
    ]
    assert timing[0] == timing[1]


def test_options_override_the_preset():
    given = ("--mp-batch-size=7", "--mp-seeds=2", "--mp-repeats=0", "--mp-modes=mixed-keras", "--mp-steps=9")
    config = Config(gpu(81559.0), *given, "--mp-autotune=fresh", "--mp-energy=0")
    found = options.settings(config, "unet", 81559.0)
    assert (found.batch_size, found.train_steps, found.autotune, found.energy_s) == (7, 9, "fresh", 0)
    assert (options.seeds(config, "unet"), options.repeats(config, "unet")) == (2, 0)
    assert [mode.name for mode in options.modes(config, "unet", gpu(81559.0))] == ["mixed-keras"]


def test_several_batches_override_those_of_the_preset():
    config = Config(gpu(81559.0), "--mp-batch-size=64,16", "--mp-static-scale=8,128")
    assert options.swept(config) == ((16, 64), (8.0, 128.0), ())
    assert options.settings(config, "unet", 81559.0).batch_size is None
    asked = options.run_options(config, Path("results"), {}, None).asked
    assert (asked["batch_size"], asked["static_scale"]) == ([16, 64], [8.0, 128.0])
    one = Config(gpu(81559.0), "--mp-batch-size=64")
    assert options.swept(one) == ((), (), ())
    assert options.run_options(one, Path("results"), {}, None).asked["batch_size"] == 64


def test_a_workload_that_does_not_fit_is_left_out_unless_its_batch_is_named():
    tiny = gpu(4096.0)
    why = options.why_left_out(Config(tiny, "--mp-preset=gpu"), "bert-base", tiny)
    assert "bert-base is left out" in why
    assert "8 GB" in why and "4.0 GiB" in why and "--mp-batch-size" in why
    assert options.why_left_out(Config(tiny, "--mp-preset=gpu", "--mp-batch-size=1"), "bert-base", tiny) is None
    assert options.why_left_out(Config(tiny, "--mp-preset=gpu"), "mnist1d-cnn", tiny) is None


def test_the_record_of_a_run_tells_the_preset_and_why():
    config = Config(gpu(81559.0))
    asked = options.run_options(config, Path("results"), {}, None).asked
    assert asked["preset"] == "gpu"
    assert "79.6 GiB" in asked["preset_reason"]


def test_every_workload_of_a_preset_exists():
    for preset in PRESETS.values():
        for name in (*preset.workloads, *preset.apart):
            assert registry.get(name).name == name


def test_the_plan_on_a_gpu_shows_the_preset_its_cases_and_what_is_left_out(tmp_path, stand_in_nvml, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write(tmp_path, test_suite=SUITE)
    script = Script(tmp_path / "nvml.txt")

    def collected(*given):
        done = pytest_in(tmp_path, "--collect-only", "-q", *given, **script.environ(stand_in_nvml))
        return done.returncode, done.stdout

    code, text = collected()
    assert code == 0
    assert "mpscale: preset gpu: the GPU has 40.0 GiB; --mp-preset names another" in text
    assert sum("[resnet50-" in line for line in text.splitlines()) == 8
    assert sum("[mnist1d-cnn-" in line for line in text.splitlines()) == 15
    assert "[mnist1d-cnn-tf32-" in text  # which an A100 has
    script.set(memory_mib=6144)
    code, text = collected("--mp-preset=gpu")
    assert code == 0
    assert "resnet50 is left out" in text and "[resnet50-" not in text and "[article-mlp-" in text
    code, text = collected("--mp-preset=gpu", "--mp-workloads=unet")
    assert code == 4
    assert "unet is left out" in text
