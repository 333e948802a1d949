"""Fine-tuning: one method a file."""
