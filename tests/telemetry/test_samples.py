"""The file of samples: written, read, cut off."""

from __future__ import annotations

import json

import pytest

from mpscale.core.reason import Code, Reason
from mpscale.telemetry.samples import Reading, Sample, SampleFile, line_of, read_samples

FULL = Sample(
    1.25, "idle", 3, 0.012, True, 300.5, 750.25, 500.0, 2, (7, 42), (), 1234.567, 60.0, 1410.0, 1215.0, 35.0, 0.0,
    ("software power cap",), ("processes",),
)  # fmt: skip
REASON = Reason(Code.NOT_TOLD, "this GPU\ndoes not report this", "buy another")


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "samples.jsonl"
    file = SampleFile(path)
    file.write(Sample(0.0))
    file.explain({Reading.POWER: REASON})
    file.explain({Reading.POWER: REASON})
    file.write(FULL)
    file.close()
    return path.read_text().splitlines(keepends=True)


def test_what_is_written_is_read(written):
    read = read_samples(written)
    assert read.rows == [Sample(0.0), FULL]
    assert read.reasons == {Reading.POWER: REASON}
    assert (read.silent, read.late) == (None, ())
    assert (read.at("idle"), read.at("done")) == (FULL, None)
    assert len(written) == 3


def test_unknown_is_left_out_and_zero_is_zero(written):
    assert json.loads(written[0]) == {"time_s": 0.0}
    assert json.loads(written[2])["utilization"] == 0.0
    assert json.loads(written[2])["graphics_pids"] == []


def test_line_that_was_cut_off_is_left_out(written):
    for length in range(len(written[-1])):
        assert read_samples([*written[:-1], written[-1][:length]]).rows == [Sample(0.0)]


def test_field_of_a_later_version_is_left_out(written):
    later = line_of({**FULL.to_json(), "fan_speed": 1})
    assert read_samples([later]).rows == [FULL]


def test_how_the_watch_ended():
    silent = read_samples([line_of({"silent": REASON.to_json()})]).silent
    assert silent == REASON
    late = read_samples([line_of({"late": ["idle"]}), line_of(FULL.to_json())])
    assert late.at("idle") is None
    assert late.not_at("idle").code is Code.DRIVER_SILENT
    assert late.not_at("done").code is Code.NOT_REACHED


@pytest.mark.parametrize("line", ["step,loss\n", "[1]\n", '{"step": 1}\n'])
def test_other_files_are_refused(line):
    with pytest.raises(ValueError):
        read_samples([line])
