"""Training sessions of many tenants over one base."""
