"""What may be done with an adapter: the licences of all it was made from, as one answer with reasons."""
