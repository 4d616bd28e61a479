"""Everything that answers: the Feast online store, the CPU tier, the ranker, their client and their rollout."""
