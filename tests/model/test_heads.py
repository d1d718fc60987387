"""Heads return one prediction per row, and the domain discriminator reverses the gradient."""

import pytest
import torch

from scgpt_hf.model.heads_scgpt import CellToGeneHead, ClassHead, ExpressionHead


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("zero", [False, True])
def test_expression_heads_predict_one_number_per_token(config, rows: int, zero: bool) -> None:
    settings = config(explicit_zero_prob=zero)
    hidden = torch.randn(rows, 16)
    for value, logit in (ExpressionHead(settings)(hidden), CellToGeneHead(settings)(hidden, hidden)):
        assert value.shape == (rows,)
        assert (logit is not None) == zero
        assert logit is None or logit.shape == (rows,)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("query", ["inner_product", "concat", "sum"])
def test_gepc_detach_stops_the_gradient_at_the_gene_embedding(config, query: str, detach: bool) -> None:
    genes, cells = torch.randn(2, 5, 16).requires_grad_().unbind()
    genes.retain_grad()
    value, _ = CellToGeneHead(config(gepc_query=query, gepc_detach=detach))(cells, genes)
    value.sum().backward()
    assert (genes.grad is None) == detach


def test_the_discriminator_reverses_the_gradient(config) -> None:
    plain = ClassHead(config(class_head_layers=3), 4)
    adversarial = ClassHead(config(), 4, adversarial=True)
    adversarial.layers[1], adversarial.layers[4] = plain.layers[1], plain.layers[4]  # the same activation
    adversarial.load_state_dict(plain.state_dict())
    gradients = []
    for head in (plain, adversarial):
        cells = torch.ones(2, 16, requires_grad=True)
        head(cells).square().sum().backward()
        gradients.append(cells.grad)
    torch.testing.assert_close(gradients[0], -gradients[1])
    torch.testing.assert_close(plain.out.weight.grad, adversarial.out.weight.grad)


def test_class_head_layers_counts_linear_layers(config) -> None:
    head = ClassHead(config(class_head_layers=1), 4)
    assert len(head.layers) == 0
    assert head(torch.randn(2, 16)).shape == (2, 4)
