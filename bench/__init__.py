"""Measurements, each with its own command: `bin/bench NAME`."""
