"""The `facet` commands of this room, one a file; heavy imports happen inside them."""
