"""The network, as flax.nnx modules."""
