"""The fault matrix: each fault against one worker and several, plain and by TLS. `bin/faults` runs
all of it.

`bin/check` runs each row once, the quickest way; the rest is marked `long`. Tests elsewhere that
are about a fault of the matrix have its mark too, and are part of it.
"""
