import pytest

from ease import losses
from tests.checks import verify

EQUATIONS = ["cross_entropy", "kl_divergence", "gated_cross_entropy", "in_chunks",
             "topk_log_probabilities", "topk_kl", "with_rest", "safety_kl", "pact_kl"]


@pytest.mark.parametrize("name", EQUATIONS)
def test_losses(name):
    verify(losses, name)
