"""Django looks for management commands below this package."""
