"""The main job: every workload trained in every mode, each in a process of its own."""


def test_training(mp_case, benchmark):
    """Trains one workload in one mode from one seed to the end, then times its steps."""
    mp_case.measure(benchmark)
