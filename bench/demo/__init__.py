"""``hicache-io demo``: real servers with and without HiCache, whose outputs must not differ."""
