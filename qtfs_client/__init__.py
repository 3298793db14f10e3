"""The client: the file system as a client sees it, its FUSE drivers and mount.qtfs."""
