"""`manage.py quarantine` and `installation`."""
