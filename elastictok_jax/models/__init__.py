"""The autoencoder: patching, transformer, bottlenecks, and the model that joins them."""
