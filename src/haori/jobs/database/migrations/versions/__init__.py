"""Migrations of the database; each takes it from one version to the next."""
