"""The preconditioned mismatch at any floor, from a table of the curvature."""

import pytest
import torch

from experiments.preconditioned import norm, save


@pytest.mark.parametrize("delta0", [0.0, 1e-9, 1e-6, 1e-3, 1.0, 1e4])
def test_a_table_gives_the_norm_at_every_floor(tmp_path, delta0):
    generator = torch.Generator().manual_seed(0)
    m = {name: torch.randn(40, 50, generator=generator) for name in ("a", "b")}
    h0 = {name: torch.exp(4 * torch.randn(40, 50, generator=generator)) for name in ("a", "b")}
    save(tmp_path, m, h0)
    exact = sum(float((m[name].double() / (h0[name].double() + delta0)).square().sum()) for name in m)
    assert norm(tmp_path, delta0) == pytest.approx(exact**0.5, rel=1e-5)


def test_where_curvature_sees_nothing_only_a_floor_gives_a_number(tmp_path):
    save(tmp_path, {"a": torch.ones(3), "head": torch.full((2,), 2.0)}, {"a": torch.tensor([0.0, 1.0, -0.0])})
    assert norm(tmp_path, 0.0) is None
    assert norm(tmp_path, 0.5) == pytest.approx((2 * 4 + 1 / 1.5**2 + 2 * 16) ** 0.5)
    with pytest.raises(ValueError, match="a: the base's curvature is negative on 1 weights"):
        save(tmp_path, {"a": torch.ones(1)}, {"a": torch.tensor([-1.0])})
