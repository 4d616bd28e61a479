"""The knowledge-graph facet: one space for users, items and what they touch, by link prediction (arXiv 2508.02609)."""
