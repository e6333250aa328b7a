"""What takes longer than a test and shows more: fuzzing, soaks, timelines through faults, the sums
of availability.
"""
