"""The tests. `running` starts the real program; every other file tests one module, or one promise."""
