"""The file operations of the protocol, a module for each kind."""
