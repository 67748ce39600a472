"""What a run can measure on this machine, and what to change first. Imports no TensorFlow; ``--gpu`` starts a worker.

Checks yield their findings: a problem is a :class:`~mpscale.core.reason.Reason` with a cure, a note is a text.
"""
