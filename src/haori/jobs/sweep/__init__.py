"""Search over recipe keys, and the learning-rate range test."""
