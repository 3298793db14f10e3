"""Rings in memory that two machines or processes share: the transports pcie:// and shm://. doc/rings.md has the layout."""
