"""How a merge is computed: piece by piece, in buffers that stay in cache, with whole-model passes where a rule needs one."""
