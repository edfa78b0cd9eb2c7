"""What a merge will do: what was asked for, checked, and decided tensor by tensor from headers alone."""
