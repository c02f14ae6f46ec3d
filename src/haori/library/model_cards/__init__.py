"""Model cards: what an author's says, and ours, written from the record."""
