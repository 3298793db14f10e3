"""FUSE drivers."""
