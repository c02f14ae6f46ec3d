"""The small steps of decoding, in torch and in C."""
