"""The tables: one module per family of architectures."""
