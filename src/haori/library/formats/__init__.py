"""File formats that adapters leave the library in, one module each."""
