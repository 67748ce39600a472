"""The modes, and which devices run them."""

import pytest

from mpscale.core.device import Device
from mpscale.core.mode import MODES, default_modes, select_modes

CPU = Device("cpu", "Some CPU")


def gpu(major, minor):
    return Device("gpu", "Some GPU", "GPU-1", (major, minor), 1000.0)


@pytest.mark.parametrize(
    ("device", "names"),
    [
        (CPU, ["fp32", "mixed-static", "mixed-dynamic", "mixed-bf16"]),
        (gpu(7, 5), ["fp32", "mixed-static", "mixed-dynamic", "mixed-bf16"]),
        (gpu(8, 0), ["fp32", "tf32", "mixed-static", "mixed-dynamic", "mixed-bf16"]),
        (gpu(9, 0), ["fp32", "tf32", "mixed-static", "mixed-dynamic", "mixed-bf16"]),
    ],
)
def test_tf32_runs_by_default_where_the_device_has_it(device, names):
    assert [mode.name for mode in default_modes(device)] == names


@pytest.mark.parametrize(
    ("device", "reason"),
    [(CPU, "this is Some CPU"), (gpu(7, 0), "this is Some GPU (7.0)"), (gpu(8, 0), None)],
)
def test_tf32_is_unsupported_on_other_devices(device, reason):
    for jit in (True, False):
        told = MODES["tf32"].unsupported_reason(device, jit)
        assert told is None if reason is None else reason in told


@pytest.mark.parametrize(
    ("device", "jit", "reasons"),
    [
        (CPU, True, ["needs an NVIDIA GPU of compute capability 7.0", "and --mp-jit off; this is Some CPU"]),
        (CPU, False, ["needs an NVIDIA GPU of compute capability 7.0", "; this is Some CPU"]),
        (gpu(6, 1), False, ["needs an NVIDIA GPU of compute capability 7.0", "; this is Some GPU (6.1)"]),
        (gpu(7, 0), True, ["no effect on functions compiled by XLA", "run this mode", "with --mp-jit off"]),
        (gpu(9, 0), True, ["no effect on functions compiled by XLA", "run this mode", "with --mp-jit off"]),
        (gpu(7, 0), False, None),
        (gpu(9, 0), False, None),
    ],
)
def test_graph_rewrite_is_unsupported_if_tensorflow_rewrites_nothing(device, jit, reasons):
    told = MODES["graph-rewrite"].unsupported_reason(device, jit)
    if reasons is None:
        assert told is None
    else:
        assert [reason for reason in reasons if reason not in told] == []
        assert ("--mp-jit" in told) is jit


@pytest.mark.parametrize(
    ("device", "jit", "reasons"),
    [
        (gpu(8, 6), True, ["compute capability 8.9 (Ada), 9.0 (Hopper) or newer", "this is Some GPU (8.6)"]),
        (gpu(8, 6), False, ["compute capability 8.9 (Ada), 9.0 (Hopper) or newer", "this is Some GPU (8.6)"]),
        (Device("gpu", "Unknown GPU"), True, ["this is Unknown GPU"]),
        (gpu(9, 0), False, ["without XLA", "with --mp-jit on"]),
        *((gpu(*capability), True, None) for capability in ((8, 9), (9, 0), (10, 0), (12, 0))),
        (CPU, True, None),
        (CPU, False, None),
    ],
)
def test_float8_is_unsupported_on_gpus_that_cannot_multiply_in_it(device, jit, reasons):
    told = MODES["mixed-fp8"].unsupported_reason(device, jit)
    assert told is None if reasons is None else [reason for reason in reasons if reason not in told] == []


def test_every_other_mode_runs_everywhere():
    places = [(device, jit) for device in (CPU, gpu(6, 1)) for jit in (True, False)]
    for name in MODES.keys() - {"tf32", "graph-rewrite", "mixed-fp8"}:
        assert [MODES[name].unsupported_reason(*place) for place in places] == [None] * 4


def test_modes_that_compute_in_half_precision_are_mixed_whatever_their_policy():
    assert [mode.name for mode in MODES.values() if not mode.is_mixed] == ["fp32", "tf32"]


def test_only_fp32_turns_tf32_off():
    assert [mode.name for mode in MODES.values() if not mode.tf32] == ["fp32"]


def test_names_are_selected_once_and_in_the_order_of_tables():
    assert [m.name for m in select_modes(["article", "fp32", "article"])] == ["fp32", "article"]


@pytest.mark.parametrize(
    ("name", "message"), [("fp23", "did you mean fp32"), ("amp", "the modes are fp32, tf32, mixed-static")]
)
def test_wrong_name_lists_the_right_ones(name, message):
    with pytest.raises(ValueError, match=message):
        select_modes(["fp32", name])
