"""The file of samples: written, read, cut off."""

from __future__ import annotations

import dataclasses

import pytest

from mpscale.telemetry.samples import FIELDS, Sample, SampleFile, read_samples

FULL = Sample(
    1.25, "idle", 3, 0.012, True, 300.5, 750.25, 500.0, 2, (7, 42), (), 1234.567, 60.0, 1410.0, 1215.0, 35.0, 0.0, 0x44
)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "samples.csv"
    file = SampleFile(path)
    file.write(Sample(0.0))
    file.tell({"power_mw": "this GPU\ndoes not tell"})
    file.tell({"power_mw": "this GPU\ndoes not tell"})
    file.write(FULL)
    file.close()
    return path.read_text().splitlines(keepends=True)


def test_what_is_written_is_read(written):
    read = read_samples(written)
    assert read.rows == [Sample(0.0), FULL]
    assert read.reasons == {"power_mw": "this GPU does not tell"}
    assert sum(line.startswith("#") for line in written) == 1


def test_unknown_is_empty_and_zero_is_zero(written):
    cells = dict(zip(FIELDS, written[1].strip().split(","), strict=True))
    assert cells["utilization"] == cells["other_pids"] == cells["event_reasons"] == ""
    assert read_samples(written).rows[1].utilization == 0.0
    assert read_samples(written).rows[1].graphics_pids == ()


def test_line_that_was_cut_off_is_left_out(written):
    assert read_samples([*written[:-1], written[-1][:9]]).rows == [Sample(0.0)]


def test_column_of_a_later_version_is_left_out(written):
    lines = [line if line.startswith("#") else f"{line.strip()},1\n" for line in written]
    lines[0] = f"{written[0].strip()},fan_speed\n"
    assert read_samples(lines).rows[1] == FULL


def test_other_files_are_refused():
    with pytest.raises(ValueError, match="no file of GPU samples"):
        read_samples(["step,loss\n", "0,1\n"])


def test_phases(written):
    read = read_samples(written)
    assert read.at("idle") == FULL
    assert read.at("done") is None
    assert read.until("idle") == read.rows
    assert read.after("idle") == read.until("done") == []
    assert [field.name for field in dataclasses.fields(Sample)] == list(FIELDS)
