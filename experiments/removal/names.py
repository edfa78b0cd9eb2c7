"""Names that a plan needs before anything is computed: ways to remove, and files of their stages."""

CLOSED = ("negation", "guarded", "ascent", "removal", "ewr", "fisher_negation")
FINE_TUNED = ("gradient_difference", "npo", "simnpo", "rmu")
WAYS = (*CLOSED, *FINE_TUNED, "perta", "kfac_penalised")
POINTS, GENERATIONS = "points.npz", "generations.jsonl"
