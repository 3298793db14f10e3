"""Rings in memory that two machines or processes share: the transports pcie:// and shm://, see doc/rings.md."""
