"""A compiled model, which trains and evaluates by itself."""
