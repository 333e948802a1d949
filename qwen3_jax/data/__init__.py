"""Data: files to tokens once (`prepare`), tokens to packed batches that any number of processes can go on with (`loader`)."""
