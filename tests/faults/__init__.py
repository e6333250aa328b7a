"""The fault matrix: each fault against one worker and several, plain and over TLS.

`bin/faults` runs all of it.

`bin/check` runs each row once, in its quickest variant; the rest is marked `long`. Other tests that
cover a fault of the matrix have its mark too, and belong to it.
"""
