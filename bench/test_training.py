"""The main job: every workload trained in every mode, each case in its own process."""


def test_training(mp_case, benchmark):
    """Train one workload in one mode from one seed to the end, then time its steps."""
    mp_case.measure(benchmark)
