"""Traffic against servers that run, recorded."""
