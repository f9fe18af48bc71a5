"""Other libraries' own names over the operations of this one, a few lines to each."""
