"""What tests, proofs and benchmarks share: real servers, clients, Redis, networks and load.

Start with `running`, which starts the real program, waits, and has the client that all of them use.
`redises` starts Redis and Sentinels, and `statsd` its daemon; `host` and `netns` say on which
machine. `site` is one server under a fault, `steady` a cluster of them, `clusters` a small one,
`world` one with its network, `member` a server that is started again. `load` are good clients,
`attackers` bad ones, `ways` some of each, `census` what a server holds. `commands` are what tests
add to a server. Nothing here judges gserver but `history` and `steady`, the judges of WHO, and
`wire`, the oracle of the wire, with its table `wire_cases`. It imports neither tests, proofs nor
benchmarks.
"""
