"""What a merge reads: opened models, adapters and stacked layers, their vocabularies and their heads."""
