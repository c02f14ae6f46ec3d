"""Records, errors, settings, hashing, safe storage and safetensors headers. Never imports torch."""
