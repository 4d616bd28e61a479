"""Scores by version: the ranker, its client, and the offline recomputation of what it answered."""
