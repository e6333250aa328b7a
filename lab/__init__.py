"""What tests, proofs and benchmarks share: real servers, clients, Redis, networks and load.

Start with `running`, which starts the real program, and has the client that all of them use.
Nothing here judges gserver but `history`, the judge of WHO, and `wire`, the oracle of the wire,
with its table `wire_cases`. It imports neither tests, proofs nor benchmarks.
"""
