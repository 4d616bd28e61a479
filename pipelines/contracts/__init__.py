"""What the rooms hand to each other: ids, windows, runs, table specs, rows, segments, manifests, versions, errors.

Everything here imports only the standard library, numpy and pyarrow, with one exception: `upper_model` needs torch,
because the network that is trained and the network that answers must be one definition. Nothing imports it but the
trainer and the ranker.
"""
