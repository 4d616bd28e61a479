"""Rows by version: the CPU tier, its client, and the same without a network in between."""
