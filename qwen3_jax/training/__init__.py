"""Training: losses, optimizer, step."""
