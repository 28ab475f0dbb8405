"""How a list of techniques runs over all parameters: buckets, phases, reductions across shards, compile."""
