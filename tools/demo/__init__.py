"""The demo: a small Qwen3-MoE learns real text, goes through Hugging Face form, and writes in three modes."""
