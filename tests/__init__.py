"""The tests. `running` starts the real program; each other file tests a module or a promise."""
