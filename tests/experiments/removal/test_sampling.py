"""The nucleus is transformers' own, whatever its size; logits without probabilities are refused."""

import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from experiments.removal.sampling import FIRST, NotFiniteError, Nucleus


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 10.0])  # from a flat distribution to a peaked one
@pytest.mark.parametrize("top_p", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("vocabulary", [50, 3 * FIRST])
def test_the_same_tokens_as_sorting_the_whole_vocabulary(scale, top_p, vocabulary):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, vocabulary, generator=generator, dtype=torch.float64) * scale
    found = Nucleus(top_p)(None, scores)
    kept = torch.isfinite(found)
    assert torch.equal(found[kept], scores[kept])
    mass = (scores.softmax(-1) * kept).sum(-1)
    assert (mass > top_p - 1e-5).all()
    expected = torch.isfinite(TopPLogitsWarper(top_p)(None, scores))
    assert ((kept.sum(-1) - expected.sum(-1)).abs() <= 1).all()  # rounding at the edge
    if scale:  # ties may be broken either way
        assert (kept != expected).sum() <= 5


def test_tokens_that_were_suppressed_stay_so():
    scores = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf]])
    assert torch.equal(Nucleus(0.99)(None, scores), scores)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_logits_without_probabilities_are_refused(broken):
    with pytest.raises(NotFiniteError, match="the logits are NaN or infinite"):
        Nucleus(0.9)(None, torch.tensor([[0.0, broken, 1.0]]))
