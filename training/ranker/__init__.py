"""The ranker: four ID tables and context features to one probability per task."""
