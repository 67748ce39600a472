"""The modes and what a device makes of them."""

import pytest

from mpscale.modes import MODES, default_modes, select_modes
from mpscale.telemetry.device import Device

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
def test_tf32_is_unsupported_elsewhere_and_says_why(device, reason):
    told = MODES["tf32"].unsupported_reason(device)
    assert told is None if reason is None else reason in told


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
