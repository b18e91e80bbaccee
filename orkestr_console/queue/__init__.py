"""The task queue on PostgreSQL, its workers, and the watchdog over them."""
