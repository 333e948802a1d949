"""A run of training as one file: its schema, where each value came from, and what it will need."""
