"""Writing text: the cache, sampling, the jitted loop, scoring."""
