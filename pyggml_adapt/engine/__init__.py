"""Computing sequences of token ids, of any tasks; it knows no text."""
