"""The tests. Each file tests a module or a promise; `lab.running` starts the real program."""
