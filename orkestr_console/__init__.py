"""The console: settings, the HTTP surface's shared parts, accounts and process commands."""
