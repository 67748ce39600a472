"""One case inside one process: the train step, training to the end, steady-state timing."""
