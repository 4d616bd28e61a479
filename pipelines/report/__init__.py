"""The demo's page: what ran, what was measured, drawn so that a person sees it at a glance."""
