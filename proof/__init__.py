"""Proofs that take longer than a test.

Fuzzing, soaks, timelines through faults, and availability sums.
"""
