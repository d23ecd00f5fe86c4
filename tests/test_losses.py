import pytest

from ease import losses
from tests.checks import verify


@pytest.mark.parametrize("name", ["cross_entropy_sum", "kl_divergence_sum", "gated_cross_entropy", "sum_over_chunks", "topk_log_probabilities", "topk_kl_sum"])
def test_losses(name):
    verify(losses, name)
