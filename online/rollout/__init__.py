"""Bringing a new version to all hosts without ever mixing it with the old one."""
