"""Measurements, each a command of its own: `bin/bench NAME`."""
