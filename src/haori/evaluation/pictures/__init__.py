"""What an adapter for pictures is worth: the same prompts and seeds drawn by base and adapter, and measured."""
