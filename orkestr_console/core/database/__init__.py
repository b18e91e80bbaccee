"""A database backend for Django: PostgreSQL's, with a fair queue in front of its pool."""
