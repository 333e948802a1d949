"""Weights in and out: Hugging Face folders and the native form."""
