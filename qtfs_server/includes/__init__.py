"""C declarations."""
