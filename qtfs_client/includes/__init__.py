"""C declarations for Cython."""
