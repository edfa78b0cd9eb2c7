"""mergekit's recipes: which keys they may hold, and what they mean here."""
