"""Examination of a machine before a run: what can be measured, and what to change. Imports no TensorFlow.

Checks yield findings: a problem is a :class:`~mpscale.core.reason.Reason` with a cure, a note is a text.
"""
