"""The ground floor: errors, names, text, addresses, and the ways to PostgreSQL and the host."""
