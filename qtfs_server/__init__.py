"""The server: sessions, nodes, file operations, the engine."""
