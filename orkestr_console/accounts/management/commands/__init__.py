"""`manage.py mint_token` and `create_demo`."""
