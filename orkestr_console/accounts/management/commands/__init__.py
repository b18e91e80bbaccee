"""`manage.py mint_token`, `create_demo`, `serve` and `worker`."""
