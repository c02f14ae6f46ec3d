"""The service's database: SQLite in a file, or PostgreSQL."""
