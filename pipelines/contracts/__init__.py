"""What the rooms hand to each other: ids, windows, runs, table specs, rows, segments, manifests, versions, errors.

Everything here imports only the standard library, numpy and pyarrow, with two exceptions: `strict` reads YAML, and
`upper_model` needs torch, because the network that is trained and the network that answers must be one definition.
Nothing imports the latter but the trainer and the ranker.
"""
