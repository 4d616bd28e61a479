"""Data in motion: logs to events, events to views, pairs, graph and examples; trained tables to published versions."""
