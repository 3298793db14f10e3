"""What every part of qtfs shares: messages, transports, addresses, the whitelist, configuration, logging and errors."""

from qtfs_common.version import __version__ as __version__
