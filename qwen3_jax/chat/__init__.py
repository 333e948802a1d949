"""Text: tokenizer, chat template, thinking."""
