"""The fuse3 driver."""
