"""Everything that learns: the contrastive and knowledge-graph facets, the ranker, quantization."""
