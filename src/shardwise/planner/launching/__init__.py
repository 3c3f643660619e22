"""Command lines and configuration files with which software runs a chosen strategy."""
