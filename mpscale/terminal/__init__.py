"""What reaches a terminal: streams and what they can show, tables that fit, and the progress of a run."""
