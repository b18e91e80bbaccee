"""`manage.py up`, `down`, `doctor` and `selfcheck`."""
