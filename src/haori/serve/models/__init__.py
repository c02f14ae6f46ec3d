"""What computes logits and vectors: Llama-like models, encoders, and the slow twin for any model."""
