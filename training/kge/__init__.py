"""The knowledge-graph facet: one space for users, items and what they touch, by link prediction (papers.md 2)."""
