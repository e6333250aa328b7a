"""What tests, proofs and benchmarks share: real servers, clients, Redis, networks and load.

Start with `running`: it starts the real program, waits for it, and has the common client.

- Services: `redises` starts Redis and Sentinels, `statsd` its daemon; `host` and `netns` choose the
  machine.
- Servers: `site` is one server under a fault, `steady` a cluster of them, `clusters` a small
  cluster, `world` a cluster with its network, `member` a server that is restarted.
- Clients: `load` has good ones, `attackers` bad ones, `ways` some of each.
- `census` measures the resources of a server. `commands` has commands that tests add.
- Judges: `history` and `steady` for WHO; `wire`, the oracle of the protocol, and its table
  `wire_cases`.

lab imports neither tests, proofs nor benchmarks.
"""
