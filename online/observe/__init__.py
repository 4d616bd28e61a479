"""What servers count and log."""
